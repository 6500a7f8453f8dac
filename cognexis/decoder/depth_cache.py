"""Keys and values of the core for tokens that ran different numbers of loops.

A token that stopped after e loops keeps its state h_e. At every deeper loop other tokens attend to the keys and values
that the shared block makes from that frozen state, and as block and state are the same in each of those loops, so are
the keys: e entries for loops 1..e and one frozen entry describe the token at every depth. Loop t reads entry

    min(t, e + 1)

which makes cached decoding equal to a full recomputation with the same depths (``depth_indexed``). The entries of all
tokens stand in one pool; per core block they take

    2 * G * D * itemsize * sum over rows and tokens of (e + 1)        bytes.

Cheaper policies keep fewer entries and are approximations for tokens of earlier calls (within one call the keys of
the loop at hand are used, except by ``first_loop``). With k = ``kv_slots``:

    last_exited   slots 1..k; loop t of a token overwrites slot min(t, k), so slot k holds its last loop
    modulo_k      slot ((t - 1) mod k) + 1, so the last k loops are kept
    first_loop    loop 1 only, for all loops

A core of several blocks keeps every loop: there a frozen token's deeper keys depend on what it attends to. Letters: B
rows, T new tokens, S cached tokens, G key/value heads, D head width, L loops that were run.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from cognexis.decoder.time_state import DepthStates

Pair = tuple[Tensor, Tensor]


class CachePolicy:
    """Which entries of a token are kept, and which of them a loop reads; ``depth`` counts the token's own loops."""

    name: ClassVar[str]
    is_exact: ClassVar[bool] = False

    def __init__(self, kv_slots: int) -> None:
        self.kv_slots = kv_slots

    def keeps(self, loop: Tensor, depth: Tensor) -> Tensor:
        """Whether the entry of ``loop`` stays; ``depth + 1`` stands for the frozen entry, and for a depth of 0."""
        raise NotImplementedError

    def count(self, depth: Tensor) -> Tensor:
        """Number of entries that stay."""
        raise NotImplementedError

    def offset(self, loop: int, depth: Tensor) -> Tensor:
        """Index, among the entries that stay, of the one that ``loop`` (from 1) reads."""
        raise NotImplementedError


class DepthIndexed(CachePolicy):
    """Every own loop and the frozen entry; exact."""

    name = "depth_indexed"
    is_exact = True

    def keeps(self, loop: Tensor, depth: Tensor) -> Tensor:
        return loop <= depth + 1

    def count(self, depth: Tensor) -> Tensor:
        return depth + 1

    def offset(self, loop: int, depth: Tensor) -> Tensor:
        return depth.clamp(max=loop - 1)


class EveryLoop(CachePolicy):
    """Every loop that the call ran, for all tokens; exact for a core of several blocks."""

    name = "depth_indexed"
    is_exact = True

    def keeps(self, loop: Tensor, depth: Tensor) -> Tensor:
        return loop <= depth

    def count(self, depth: Tensor) -> Tensor:
        return depth

    def offset(self, loop: int, depth: Tensor) -> Tensor:
        return depth.clamp(max=loop) - 1


class LastExited(CachePolicy):
    """The first k - 1 loops and the last one."""

    name = "last_exited"

    def keeps(self, loop: Tensor, depth: Tensor) -> Tensor:
        last = depth.clamp(min=1)
        return (loop <= last.clamp(max=self.kv_slots - 1)) | (loop == last)

    def count(self, depth: Tensor) -> Tensor:
        return depth.clamp(min=1, max=self.kv_slots)

    def offset(self, loop: int, depth: Tensor) -> Tensor:
        return depth.clamp(min=1, max=min(loop, self.kv_slots)) - 1


class ModuloK(CachePolicy):
    """The last k loops; loop t reads the newest of them that is congruent to t modulo k."""

    name = "modulo_k"

    def keeps(self, loop: Tensor, depth: Tensor) -> Tensor:
        last = depth.clamp(min=1)
        return (loop <= last) & (loop > last - self.kv_slots)

    def count(self, depth: Tensor) -> Tensor:
        return depth.clamp(min=1, max=self.kv_slots)

    def offset(self, loop: int, depth: Tensor) -> Tensor:
        last, k = depth.clamp(min=1), self.kv_slots
        newest = last - (last - loop) % k  # largest loop <= last that is congruent to ``loop``
        in_order = newest - (last - k + 1)
        return torch.where(last >= k, in_order, last.clamp(max=(loop - 1) % k + 1) - 1)


class FirstLoop(CachePolicy):
    """Loop 1 for all loops, within a call too."""

    name = "first_loop"

    def keeps(self, loop: Tensor, depth: Tensor) -> Tensor:
        return (loop == 1).expand_as(depth)

    def count(self, depth: Tensor) -> Tensor:
        return torch.ones_like(depth)

    def offset(self, loop: int, depth: Tensor) -> Tensor:
        return torch.zeros_like(depth)


_POLICIES: dict[str, type[CachePolicy]] = {
    policy.name: policy for policy in (DepthIndexed, LastExited, ModuloK, FirstLoop)
}


def build_policy(name: str, kv_slots: int, num_blocks: int = 1) -> CachePolicy:
    """The policy called ``name`` (see the module docstring) for a core of ``num_blocks`` blocks."""
    return EveryLoop(kv_slots) if num_blocks > 1 and name == "depth_indexed" else _POLICIES[name](kv_slots)


class DepthLayer(CacheLayerMixin):
    """The cached tokens of one core block; what the storage forms have in common.

    Args:
        policy: which entries are kept.
        sliding_window: keys a query may look back to, itself included; older tokens are dropped. None keeps all.

    Attributes:
        deepest: ``[B]`` most loops of a token so far, those out of the window included; None while empty.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, policy: CachePolicy, sliding_window: int | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.cumulative_length = 0
        self.deepest: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first entries."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Not used: the loops of a call are collected first, see :class:`DepthKeys`."""
        raise NotImplementedError

    def note_loops(self, loops: Tensor) -> None:
        """Remember how deep new tokens went; ``loops`` ``[B, T]``."""
        new = loops.amax(dim=1)
        self.deepest = new if self.deepest is None else torch.maximum(self.deepest, new)

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until the next crop."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window, or -1 for no limit."""
        return self.sliding_window if self.sliding_window is not None else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys for ``query_length`` new tokens, and how many older ones are out of sight."""
        visible = self._visible()
        return visible + query_length, self.cumulative_length - visible

    def _visible(self) -> int:
        window = self.sliding_window
        return self.cumulative_length if window is None else min(self.cumulative_length, window - 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue what row ``beam_idx[i]`` holds."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies next to each other."""
        if self.is_initialized:
            rows = torch.arange(self._num_rows(), device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        if self.is_initialized:
            indices = indices.to(self.device)
            self.deepest = None if self.deepest is None else self.deepest[indices]
            self._select(indices)

    def _num_rows(self) -> int:
        raise NotImplementedError

    def _select(self, rows: Tensor) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0
        self.deepest = None


class MixedDepthLayer(DepthLayer):
    """The entries of all tokens in one pool, without gaps.

    Attributes:
        keys: ``[N, G, D]``, the pool; ``values`` likewise.
        first: ``[B, S]`` index of each token's first entry.
        depth: ``[B, S]`` own loops of each token.
    """

    def append(self, keys: Tensor, values: Tensor, depths: Tensor) -> None:
        """Add tokens.

        Args:
            keys: ``[B, T, L + 1, G, D]``; entry e of a token of depth e (from 0) is its frozen one.
            values: likewise.
            depths: ``[B, T]`` own loops, at most L.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys.new_empty(0, *keys.shape[-2:]), values.new_empty(0, *values.shape[-2:])
            self.first = depths.new_empty(depths.shape[0], 0)
            self.depth = self.first
        assert self.keys is not None and self.values is not None
        loops = torch.arange(1, keys.shape[2] + 1, device=depths.device)
        is_kept = self.policy.keeps(loops, depths[..., None].expand(*depths.shape, len(loops)))
        counts = self.policy.count(depths)
        starts = counts.flatten().cumsum(0).view_as(counts) - counts
        self.first = torch.cat((self.first, starts + self.keys.shape[0]), dim=1)
        self.depth = torch.cat((self.depth, depths), dim=1)
        self.keys = torch.cat((self.keys, keys[is_kept]))
        self.values = torch.cat((self.values, values[is_kept]))
        self.cumulative_length += depths.shape[1]
        if self.is_sliding and not self.record_past:
            self._keep_visible()

    def read(self, loop: int, rows: Tensor | None = None) -> Pair | None:
        """Keys and values ``[R, G, S, D]`` of ``loop`` (from 1) for ``rows`` (all when None); None while empty."""
        if not self.is_initialized or (visible := self._visible()) == 0:
            return None
        assert self.keys is not None and self.values is not None
        first, depth = self.first[:, -visible:], self.depth[:, -visible:]
        if rows is not None:
            first, depth = first[rows], depth[rows]
        index = first + self.policy.offset(loop, depth)
        return self.keys[index].transpose(1, 2), self.values[index].transpose(1, 2)

    def _keep_visible(self) -> None:
        if (hidden := self.first.shape[1] - self._visible()) > 0:
            self._rebuild(self.first[:, hidden:], self.depth[:, hidden:])

    def _rebuild(self, first: Tensor, depth: Tensor) -> None:
        """Let the pool hold the entries of these tokens, each token's copy its own, and nothing else."""
        assert self.keys is not None and self.values is not None
        counts = self.policy.count(depth).flatten()
        starts = counts.cumsum(0) - counts
        index = torch.repeat_interleave(first.flatten() - starts, counts)
        index = index + torch.arange(len(index), device=index.device)
        self.keys, self.values = self.keys[index], self.values[index]
        self.first, self.depth = starts.view_as(first), depth

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens, and those out of the window."""
        if tokens_to_remove:
            self.cumulative_length += tokens_to_remove
            kept = self.first.shape[1] + tokens_to_remove
            self._rebuild(self.first[:, :kept], self.depth[:, :kept])
        if self.is_sliding:
            self._keep_visible()

    def _num_rows(self) -> int:
        return self.first.shape[0]

    def _select(self, rows: Tensor) -> None:
        self._rebuild(self.first[rows], self.depth[rows])


class ReferenceDepthLayer(DepthLayer):
    """The plain form of ``depth_indexed``: the frozen entry is written into every deeper loop's slot.

    Attributes:
        keys: ``[B, S, M, G, D]``, M one more than the deepest loop so far; ``values`` likewise.
    """

    def append(self, keys: Tensor, values: Tensor, depths: Tensor) -> None:
        """As :meth:`MixedDepthLayer.append`; entries behind the frozen one repeat it."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[:, :0], values[:, :0]
        assert self.keys is not None and self.values is not None
        size = max(self.keys.shape[2], keys.shape[2])
        self.keys = torch.cat((_deepened(self.keys, size), _deepened(keys, size)), dim=1)
        self.values = torch.cat((_deepened(self.values, size), _deepened(values, size)), dim=1)
        self.cumulative_length += depths.shape[1]

    def read(self, loop: int, rows: Tensor | None = None) -> Pair | None:
        """As :meth:`MixedDepthLayer.read`."""
        if not self.is_initialized or (visible := self._visible()) == 0:
            return None
        assert self.keys is not None and self.values is not None
        slot = min(loop, self.keys.shape[2]) - 1
        pair = (x[:, -visible:, slot].transpose(1, 2) for x in (self.keys, self.values))
        keys, values = (x if rows is None else x[rows] for x in pair)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens."""
        assert self.keys is not None and self.values is not None
        self.cumulative_length += tokens_to_remove
        self.keys, self.values = self.keys[:, : self.cumulative_length], self.values[:, : self.cumulative_length]

    def _num_rows(self) -> int:
        assert self.keys is not None
        return self.keys.shape[0]

    def _select(self, rows: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


def _deepened(entries: Tensor, size: int) -> Tensor:
    missing = size - entries.shape[2]
    return torch.cat((entries, *([entries[:, :, -1:]] * missing)), dim=2) if missing else entries


class DepthKeys:
    """Stands where a cache would while the loops of one call run, and hands their entries to the cache at the end.

    Args:
        layers: one per core block, or None when nothing is cached.
        first_slot: key/value slot of the first core block in loop 1.
        num_blocks: core blocks.
        shape: B and T.
        shares_first_loop: all loops read the keys of loop 1.
    """

    def __init__(
        self,
        layers: list[Any] | None,
        first_slot: int,
        num_blocks: int,
        shape: tuple[int, int],
        shares_first_loop: bool = False,
    ) -> None:
        self.layers = layers
        self.shape = shape
        self.first_slot = first_slot
        self.num_blocks = num_blocks
        self.shares_first_loop = shares_first_loop
        self._loops: list[list[Pair]] = [[] for _ in range(num_blocks)]  # what each loop left, for commit
        self._current: list[Pair | None] = [None] * num_blocks  # what every token shows to the loop at hand
        self._new: list[Pair | None] = [None] * num_blocks  # of the loop at hand
        self._rows: Tensor | None = None
        self._tokens: Tensor | None = None
        self._goes_on = False
        self._stacks: dict[int, Any] = {}  # by block: layers with memory over time, and below what their loops left
        self._states: dict[int, dict[int, list[tuple[Tensor, Any]]]] = {}
        self.made_up_tokens = 0  # steps that states over time had left out before

    @property
    def num_loops(self) -> int:
        """Loops collected so far."""
        return max(*map(len, self._loops), *map(len, self._states.values()), 0)

    def choose(self, rows: Tensor | None, tokens: Tensor | None, goes_on: bool = False) -> None:
        """The next loop computes ``tokens`` ``[R, A]`` of ``rows`` ``[R]`` only; None means all of all.

        With ``goes_on`` these are further rows of the loop at hand.
        """
        self._rows, self._tokens, self._goes_on = rows, tokens, goes_on

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        """Take the keys of the loop at hand and return, for the chosen rows, all that its queries may see.

        Args:
            key_states: ``[R, G, A, D]``.
            value_states: likewise.
            layer_idx: slot of the site, which tells block and loop.
        """
        loop, block = divmod(layer_idx - self.first_slot, self.num_blocks)
        if self._rows is None:
            new = (key_states, value_states)
        else:
            assert self._tokens is not None
            new = self._placed(block, (key_states, value_states), self._rows, self._tokens)
        self._new[block] = new
        if not (self.shares_first_loop and loop > 0):
            self._current[block] = new
        if self.layers is not None and not self._goes_on:
            self._loops[block].append(new)
        shown = self._current[block]
        assert shown is not None
        if self._rows is not None:
            shown = (shown[0][self._rows], shown[1][self._rows])
        past = None if self.layers is None else self.layers[block].read(loop + 1, self._rows)
        if past is None:
            return shown
        return torch.cat((past[0], shown[0]), dim=2), torch.cat((past[1], shown[1]), dim=2)

    def advance(self, stack: Any, x: Tensor, layer_idx: int, resets: Tensor | None = None) -> Tensor:
        """Let a layer with memory over time read the loop at hand, for all tokens of the chosen rows.

        Args:
            stack: the layer's stack.
            x: ``[R, T, H]``.
            layer_idx: slot of the loop, which tells block and loop.
            resets: bool ``[R, T]``, where the state begins anew.
        """
        loop, block = divmod(layer_idx - self.first_slot, self.num_blocks)
        layer = DepthStates() if self.layers is None else self.layers[block]
        y, states, made_up = layer.run(loop + 1, stack, x, resets, self._rows)
        self._stacks[block] = stack
        self._states.setdefault(block, {})[loop + 1] = states
        self.made_up_tokens += made_up
        return y

    def commit_states(self, loops: Tensor, inputs: Tensor, resets: Tensor | None) -> None:
        """Store the states of the call.

        Args:
            loops: ``[B, T]`` loops that the tokens ran.
            inputs: ``[B, T, H]``, what deeper loops would read of the tokens.
            resets: bool ``[B, T]``, where states begin anew.
        """
        for block, layer in enumerate(self.layers or ()):
            if isinstance(layer, DepthStates):
                layer.commit(self._states.get(block, {}), self._stacks.get(block), inputs, resets, loops)

    def freeze(self, rows: Tensor, tokens: Tensor, pair: Pair) -> None:
        """Let tokens that just stopped show ``pair`` ``[R, G, A, D]`` to deeper loops; for a core of one block."""
        if not self.shares_first_loop:
            self._goes_on = False
            self._current[0] = self._placed(0, pair, rows, tokens)

    def _placed(self, block: int, pair: Pair, rows: Tensor, tokens: Tensor) -> Pair:
        """The current keys ``[B, G, T, D]`` of all tokens with ``pair`` at ``tokens`` of ``rows``.

        Tokens that the first loop leaves out show zeros: they are padding or belong to ended rows. Further rows of a
        loop are written into what its first rows made.
        """
        base, placed = self._new[block] if self._goes_on else self._current[block], []
        for which, new in enumerate(pair):
            if base is None:
                result = new.new_zeros((self.shape[0], new.shape[1], self.shape[1], new.shape[3]))
            else:
                result = base[which] if self._goes_on else base[which].clone()
            result[rows[:, None], :, tokens] = new.transpose(1, 2)
            placed.append(result)
        return placed[0], placed[1]

    def commit(self, loops: Tensor, depths: Tensor, frozen: list[Pair] | None) -> None:
        """Store the entries of the call's tokens.

        Args:
            loops: ``[B, T]`` loops that the tokens ran.
            depths: ``[B, T]`` loops whose entries are their own; more where deeper ones had to be computed.
            frozen: keys and values ``[B, G, T, D]`` made from the final states, one pair per block; None where the
                policy does not read them.
        """
        for block, layer in enumerate(self.layers or ()):
            if isinstance(layer, DepthStates):
                continue
            collected = self._loops[block]
            last = collected[-1] if frozen is None else frozen[block]
            stacked = []
            for which in (0, 1):
                entries = torch.stack([*(pair[which] for pair in collected), last[which]], dim=3)
                entries = entries.permute(0, 2, 3, 1, 4)  # [B, T, L + 1, G, D]
                if frozen is not None:
                    own = torch.arange(entries.shape[2], device=depths.device) < depths[..., None]
                    entries = torch.where(own[..., None, None], entries, last[which].transpose(1, 2)[:, :, None])
                stacked.append(entries)
            layer.append(*stacked, depths)
            layer.note_loops(loops)
