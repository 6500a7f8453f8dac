"""States over time in the cache: one slot per layer and, in the core, per loop.

A layer with memory over time maps a sequence and a state to outputs and the next state. In the core every loop index
owns a state of its own (h^(i)_t is the state of loop i after token t, x^(i)_t what loop i reads there):

    y^(i)_t, h^(i)_t = cell(x^(i)_t, h^(i)_{t-1})

so the states of loop i depend on loop i of earlier tokens only: a scan over time exists in every loop, and a prompt
read at once, in chunks or token by token gives the same states.

Where tokens may run different numbers of loops, a token that stopped after e loops keeps its core state s_e, and in
every deeper loop the cell reads what the loop makes of it:

    x^(i)_t = in(s^(min(i - 1, e))_t)         in: the injection of h_0 where it stands at the entry, else the identity

The input behind the last own loop is the same for all deeper loops, so one vector per token suffices to make up for
the steps that were left out, when a later token first goes that deep. ``DepthStates`` keeps these vectors, H numbers
per token, and for every loop the state and how many tokens it has consumed, row by row.

Taking tokens back (``crop``) needs the past: while it is recorded, a slot keeps the state before each call and what
the call read, and replays what remains. Letters: B rows, R of them, T new tokens, S tokens so far, H hidden width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from cognexis.errors import CacheError


@dataclass(frozen=True)
class RecordedCall:
    """What a slot needs to take a call back: the state before it, what it read ``[B, T, H]``, and its resets."""

    state: Any
    inputs: Tensor
    resets: Tensor | None

    def first(self, tokens: int) -> "RecordedCall":
        """The same call with its first ``tokens`` tokens only."""
        return RecordedCall(self.state, self.inputs[:, :tokens], _until(self.resets, tokens))

    def rows(self, indices: Tensor) -> "RecordedCall":
        """The same call for the rows ``indices``."""
        resets = None if self.resets is None else self.resets[indices]
        return RecordedCall(self.state[indices], self.inputs[indices], resets)


class TimeStateSlot(CacheLayerMixin):
    """What both kinds of slots share: no keys, a length, rows that can be picked.

    Args:
        capacity: tokens that masks count with in a static cache; 0 where it grows.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.is_compileable = capacity > 0
        self.record_past = False
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Not used: there are no keys."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not used: there are no keys."""
        raise CacheError("past_key_values: this slot holds a state over time, not keys and values")

    def activate_past_recording(self) -> None:
        """Keep what a later ``crop`` needs, until that crop."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """Tokens of a static cache, -1 for no limit."""
        return self.capacity or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As an attention layer that keeps everything."""
        return self.capacity or self.cumulative_length + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue what row ``beam_idx[i]`` holds."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies next to each other."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.num_rows, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        raise NotImplementedError

    def require_recorded(self, tokens: int) -> None:
        """Raise unless the newest ``tokens`` tokens can be taken back.

        Raises:
            CacheError: a state over time cannot be rolled back by itself.
        """
        raise NotImplementedError

    def offload(self) -> None:
        """States are small and stay where they are."""

    def prefetch(self) -> None:
        """States are small and stay where they are."""

    @property
    def num_rows(self) -> int:
        """B, once something is stored."""
        raise NotImplementedError

    def stored_tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        raise NotImplementedError

    def _note_kind(self, x: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = x.dtype, x.device, True


class TimeStateLayer(TimeStateSlot):
    """The state of one layer, or of one loop of a core layer, where all tokens run the same loops.

    Attributes:
        state: TensorDict of batch size ``[B]``; None while empty.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__(capacity)
        self.state: Any = None
        self._calls: list[RecordedCall] = []
        self._replay: RecordedCall | None = None

    @property
    def num_rows(self) -> int:
        return int(self.state.batch_size[0])

    def advance(self, stack: Any, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """Let ``stack`` read ``[B, T, H]`` and keep the state; ``resets`` ``[B, T]`` begin anew before a token."""
        state = self._current(stack, x)
        if self.record_past:
            self._calls.append(RecordedCall(state, x, resets))
        y, state = stack(x, state, resets=resets)
        self._store(state, x)
        self._replay = None
        self.cumulative_length += x.shape[1]
        return y

    def peek(self, stack: Any, x: Tensor, resets: Tensor | None = None) -> Tensor:
        """As :meth:`advance`, but nothing is kept."""
        return stack(x, self._current(stack, x), resets=resets)[0]

    def _current(self, stack: Any, x: Tensor) -> Any:
        """The state behind the last token, or a fresh one."""
        if self.state is None:
            return stack.init_state(x.shape[0], device=x.device, dtype=x.dtype, traces=False)
        if self._replay is None:
            return self.state
        return stack(self._replay.inputs, self._replay.state, resets=self._replay.resets)[1]

    def _store(self, state: Any, x: Tensor) -> None:
        if self.is_compileable and self.state is not None:  # compiled graphs know the tensors by their addresses
            self.state.update_(state)
        else:
            self.state = state.clone() if self.is_compileable else state
            self._note_kind(x)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens, and all that was recorded before them.

        Raises:
            CacheError: they were not recorded. Nothing is changed then.
        """
        missing = -tokens_to_remove
        if missing == 0:
            self._calls = []
            return
        kept = list(self._calls) if self._replay is None else [self._replay, *self._calls]
        while kept and kept[-1].inputs.shape[1] <= missing:
            missing -= kept[-1].inputs.shape[1]
            last = kept.pop()
            if missing == 0:
                self.state, self._calls, self._replay = last.state, [], None
                self.cumulative_length += tokens_to_remove
                return
        if not kept:
            self.require_recorded(-tokens_to_remove)
        call = kept[-1].first(kept[-1].inputs.shape[1] - missing)
        self.state, self._replay, self._calls = call.state, call, []
        self.cumulative_length += tokens_to_remove

    def require_recorded(self, tokens: int) -> None:
        replay = [] if self._replay is None else [self._replay]
        recorded = sum(call.inputs.shape[1] for call in [*replay, *self._calls])
        if tokens > recorded:
            raise CacheError(
                f"past_key_values: a state over time cannot take back {tokens} tokens, {recorded} were recorded; call "
                "activate_past_recording() before decoding to be able to crop"
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            indices = indices.to(self.device)
            self._store_rows(indices)

    def _store_rows(self, indices: Tensor) -> None:
        picked = self.state[indices]
        if self.is_compileable and picked.batch_size == self.state.batch_size:
            self.state.update_(picked)
        else:
            self.state = picked
        self._calls = [call.rows(indices) for call in self._calls]
        self._replay = None if self._replay is None else self._replay.rows(indices)

    def reset(self) -> None:
        """Forget all tokens."""
        self.state, self._calls, self._replay = None, [], None
        self.is_initialized = False
        self.cumulative_length = 0

    def stored_tensors(self) -> list[Tensor]:
        recorded = [t for call in self._calls for t in (call.inputs, *call.state.values(True, True))]
        return [*([] if self.state is None else self.state.values(True, True)), *recorded]


class DepthStates(TimeStateSlot):
    """The states of one core layer, all loops, where tokens may run different numbers of loops.

    Attributes:
        states: state by loop (from 1), each of batch size ``[B]``.
        consumed: by loop, how many tokens each row's state has read.
        inputs: ``[B, S, H]``, what loops deeper than a token's own read of it; None while empty.
        resets: ``[B, S]`` bool, where rows begin anew; None where they never do.
        deepest: ``[B]`` most loops of a token so far; None while empty.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.states: dict[int, Any] = {}
        self.consumed: dict[int, list[int]] = {}
        self.inputs: Tensor | None = None
        self.resets: Tensor | None = None
        self.deepest: Tensor | None = None
        self._calls: list[tuple[int, int, Tensor, Tensor | None, Any]] = []
        self.is_initialized = False
        self.cumulative_length = 0

    @property
    def num_rows(self) -> int:
        assert self.inputs is not None
        return self.inputs.shape[0]

    def run(
        self, loop: int, stack: Any, x: Tensor, resets: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, list[tuple[Tensor, Any]], int]:
        """Let loop ``loop`` (from 1) read new tokens; nothing is kept before :meth:`commit`.

        Args:
            loop: loop number.
            stack: the layer.
            x: ``[R, T, H]``, what the loop reads of all tokens of the call.
            resets: ``[R, T]`` or None.
            rows: ``[R]`` rows of the batch; None means all.

        Returns:
            The outputs ``[R, T, H]``, new states by group of rows, and the number of earlier tokens made up for.
        """
        numbers = list(range(x.shape[0])) if rows is None else rows.tolist()
        index = torch.arange(x.shape[0], device=x.device) if rows is None else rows
        behind = [0] * x.shape[0]
        if self.inputs is not None:
            read = self.consumed.get(loop, [0] * self.num_rows)
            behind = [self.cumulative_length - read[row] for row in numbers]
        y: Tensor | None = None
        found, made_up = [], 0
        for length in sorted(set(behind)):  # rows that are equally far behind are computed together
            chosen = torch.tensor([i for i, n in enumerate(behind) if n == length], device=x.device)
            is_all = len(chosen) == x.shape[0]
            part, marks = (x, resets) if is_all else (x[chosen], None if resets is None else resets[chosen])
            at = index if is_all else index[chosen]
            if loop in self.states:
                state = self.states[loop] if len(at) == self.num_rows and rows is None else self.states[loop][at]
            else:
                state = stack.init_state(len(at), device=x.device, dtype=x.dtype, traces=False)
            if length:
                assert self.inputs is not None
                earlier = None if self.resets is None else self.resets[at, -length:]
                marks = _joined(earlier, marks, (len(at), length), (len(at), x.shape[1]), x.device)
                part = torch.cat((self.inputs[at, -length:], part), dim=1)
                made_up += length * len(at)
            out, state = stack(part, state, resets=marks)
            out = out[:, length:]
            if is_all:
                y = out
            else:
                y = out.new_zeros(x.shape) if y is None else y
                y[chosen] = out
            found.append((at, state))
        assert y is not None
        return y, found, made_up

    def commit(
        self,
        states: dict[int, list[tuple[Tensor, Any]]],
        stack: Any,
        inputs: Tensor,
        resets: Tensor | None,
        loops: Tensor,
    ) -> None:
        """Keep a call.

        Args:
            states: what :meth:`run` gave, by loop.
            stack: the layer.
            inputs: ``[B, T, H]``, what deeper loops read of the call's tokens.
            resets: ``[B, T]`` or None.
            loops: ``[B, T]`` loops that the tokens ran.
        """
        rows, length = inputs.shape[:2]
        total = self.cumulative_length + length
        for loop, groups in states.items():
            if len(groups) == 1 and len(groups[0][0]) == rows:
                self.states[loop], self.consumed[loop] = groups[0][1], [total] * rows
                continue
            if loop in self.states:
                merged = self.states[loop].clone()
            else:
                merged = stack.init_state(rows, device=inputs.device, dtype=inputs.dtype, traces=False)
            read = list(self.consumed.get(loop, [0] * rows))
            for at, state in groups:
                merged[at] = state
                for row in at.tolist():
                    read[row] = total
            self.states[loop], self.consumed[loop] = merged, read
        past = None if self.inputs is None else (rows, self.cumulative_length)
        if past is not None:
            resets = _joined(self.resets, resets, past, (rows, length), inputs.device)
            assert self.inputs is not None
            inputs = torch.cat((self.inputs, inputs), dim=1)
        self.inputs, self.resets = inputs, resets
        self.cumulative_length = total
        self._note_kind(inputs)
        new = loops.amax(dim=1)
        self.deepest = new if self.deepest is None else torch.maximum(self.deepest, new)

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible where depths differ.

        Raises:
            CacheError: tokens would have to be taken back.
        """
        if tokens_to_remove:
            self.require_recorded(-tokens_to_remove)

    def require_recorded(self, tokens: int) -> None:
        if tokens:
            raise CacheError("past_key_values: states of tokens of different loop counts cannot be cropped")

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:
            return
        assert self.inputs is not None and self.deepest is not None
        indices = indices.to(self.device)
        chosen = indices.tolist()
        self.states = {loop: state[indices] for loop, state in self.states.items()}
        self.consumed = {loop: [read[row] for row in chosen] for loop, read in self.consumed.items()}
        self.inputs, self.deepest = self.inputs[indices], self.deepest[indices]
        self.resets = None if self.resets is None else self.resets[indices]

    def stored_tensors(self) -> list[Tensor]:
        held = [t for t in (self.inputs, self.resets, self.deepest) if t is not None]
        return held + [t for state in self.states.values() for t in state.values(True, True)]


def _until(resets: Tensor | None, tokens: int) -> Tensor | None:
    return None if resets is None else resets[:, :tokens]


def _joined(
    before: Tensor | None,
    after: Tensor | None,
    before_shape: tuple[int, int],
    after_shape: tuple[int, int],
    device: torch.device,
) -> Tensor | None:
    """Resets of two stretches in one; None where neither has any."""
    if before is None and after is None:
        return None
    parts = ((before, before_shape), (after, after_shape))
    full = [torch.zeros(shape, dtype=torch.bool, device=device) if mask is None else mask for mask, shape in parts]
    return torch.cat(full, dim=1)
