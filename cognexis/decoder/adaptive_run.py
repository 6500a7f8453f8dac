"""One call of the core in which tokens may stop at different loops.

The dense form is the reference: every loop computes every token and keeps the update of the active ones,

    h = where(active, R(h), h)

The compact form gives the same result for less: rows without an active token are left out, and within a row only the
active tokens are computed, against the keys of all tokens. Rows are computed together in groups of nearly as many
active tokens each, so that little is made up to fill a group: at most 4 % of its tokens, or in the form "grouped" what
costs no more than starting another group would. A token that has just stopped shows deeper loops the keys
of its frozen state, for which one key and value projection suffices because the core is a single block (see
``depth_cache``). The compact form reads on the host which tokens are active, so it waits once per loop.

Letters: B rows, T tokens of the call, H hidden width, R rows computed, A tokens computed in each of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cognexis.decoder.block import TransformerBlock
from cognexis.decoder.depth_cache import CachePolicy, DepthKeys, FirstLoop
from cognexis.decoder.inputs import last_real_token
from cognexis.decoder.recurrent_core import RecurrentCore
from cognexis.looping.cost import core_flops_per_token
from cognexis.looping.signals import (
    confidence,
    entropy,
    hidden_delta,
    log_probabilities,
    margin,
    prediction_change,
    relative_delta,
    row_maximum,
    state_norm,
)
from cognexis.looping.value_head import ValueHead

_PROBED = frozenset({"confidence", "margin", "entropy", "prediction_change"})
_AT_LAST_TOKEN = frozenset({"confidence", "margin", "entropy"})
_FILL_SHARE = 0.04
_START_FLOPS = 80_000_000  # measured on one CPU core: some milliseconds
_VALUE_FIELDS = ("continue_logit", "uncertainty")  # outputs of a value head with a field of their own


class AdaptiveRun:
    """Computes loops for some tokens and measures what they did; a ``LoopedCore`` of the driver.

    Args:
        core: the recurrent core.
        h0: ``[B, T, H]``, the prelude output.
        masks: attention masks of the core by layer type.
        shared: ``position_embeddings``, ``position_ids`` and what is handed down to attention.
        is_real: bool ``[B, T]``, False at padding.
        cache: the bound cache, or None.
        compaction: "exact" leaves stopped tokens out and waits for the host once per loop; "grouped" does so as far as
            it pays; "off" computes densely.
        reduces_rows: signals are reduced to one per row.
        probe: gives logits ``[B, T, V]`` of a state, or of each row's last real token ``[B, 1, V]``; called as
            ``probe(state, last_only)``.
        value_head: predicts what further loops gain; None without one.

    Attributes:
        state: ``[B, T, H]`` after the loops so far.
        computed_tokens: token positions computed by all loops so far.
        num_probes: times that coda and head were run to measure.
    """

    def __init__(
        self,
        core: RecurrentCore,
        h0: Tensor,
        masks: dict[str, Any],
        shared: dict[str, Any],
        is_real: Tensor,
        *,
        cache: Any = None,
        compaction: str = "exact",
        reduces_rows: bool = False,
        probe: Callable[[Tensor, bool], Tensor] | None = None,
        value_head: ValueHead | None = None,
    ) -> None:
        self.core, self.h0, self.masks, self.is_real = core, h0, masks, is_real
        self.shared = {name: value for name, value in shared.items() if name != "past_key_values"}
        self.reduces_rows, self.probe, self.value_head = reduces_rows, probe, value_head
        self.memories = core.memories(h0, shared["position_embeddings"], cache)
        policy: CachePolicy | None = None if cache is None else cache.policy
        self.keys = DepthKeys(
            None if cache is None else cache.depth_layers,
            core.config.first_loop_slot,
            len(core.blocks),
            (h0.shape[0], h0.shape[1]),
            shares_first_loop=isinstance(policy, FirstLoop),
        )
        self._stores_frozen = policy is not None and policy.is_exact and isinstance(core.blocks[0], TransformerBlock)
        self._stores_frozen &= len(core.blocks) == 1
        self.runs_all_loops = policy is not None and policy.is_exact and len(core.blocks) > 1
        self.waits = compaction != "off" and self._is_separable and not torch.is_grad_enabled()
        self._allowance = _free_tokens(core.config, h0.shape[1]) if compaction == "grouped" else 0
        picks = core.state_layer is None and all(isinstance(m, Tensor) and m.ndim == 4 for m in masks.values())
        self._picks_tokens = picks
        self.state = core.initial_state(h0, shared["position_ids"])
        self.previous = self.state
        self.states: list[Tensor] = []
        self.computed_tokens = 0
        self.num_probes = 0
        self._ran: Tensor | None = None
        self._log_probs: Tensor | None = None

    @property
    def _is_separable(self) -> bool:
        """Whether rows and tokens can be computed apart: masks that can be indexed, one block, no packed layout."""
        readable = all(m is None or (isinstance(m, Tensor) and m.ndim in (2, 4)) for m in self.masks.values())
        return readable and len(self.core.blocks) == 1 and self.shared.get("cu_seq_lens_q") is None

    def advance(self, loop_index: int, active: Tensor) -> None:
        """Run loop ``loop_index`` (from 0) for the tokens of ``active`` ``[B, T]``."""
        self.previous = self.state
        groups = self._choose(active) if self.waits else None
        if groups is None:
            self.keys.choose(None, None)
            update, _ = self.core.loop(
                self.state, self.h0, loop_index, self.masks, self.memories, past_key_values=self.keys, **self.shared
            )
            self.state = torch.where(active[..., None], update, self.state)
            self.computed_tokens += active.numel()
        else:
            if self._ran is not None and any(tokens.shape[1] < active.shape[1] for _, tokens in groups):
                self._freeze(self._ran & ~active & active.any(dim=1, keepdim=True))
            self.state = self.state.clone()
            for place, (rows, tokens) in enumerate(groups):
                self.keys.choose(rows, tokens, goes_on=place > 0)
                self._advance_some(loop_index, active, rows, tokens)
        self.state = self.core.loop_state(self.state)
        self._ran = active
        if self.core.config.state_retention != "final_only":
            self.states.append(self.state)

    def _choose(self, active: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """Rows ``[R]`` and their tokens ``[R, A]`` by group; None when that is everything, or nothing (padding)."""
        counts = active.sum(dim=1)
        rows, length = counts.nonzero()[:, 0], active.shape[1]
        if not self._picks_tokens:
            counts = torch.full_like(counts, length)
        rows = rows[counts[rows].argsort(descending=True, stable=True)]
        sizes = counts[rows].tolist()
        if not sizes or (len(sizes) == active.shape[0] and sizes[-1] == length):
            return None
        ordered = (~active[rows]).long().argsort(dim=1, stable=True) if self._picks_tokens else None
        groups = []
        for start, end in _groups(sizes, self._allowance):
            some = torch.arange(length, device=rows.device).expand(end - start, length)
            if ordered is not None and sizes[start] < length:
                some = ordered[start:end, : sizes[start]]
            groups.append((rows[start:end], some))
        return groups

    def _advance_some(self, loop_index: int, active: Tensor, rows: Tensor, tokens: Tensor) -> None:
        at, length = (rows[:, None], tokens), active.shape[1]
        state = self.state[at]
        update, _ = self.core.loop(
            state,
            self.h0[at],
            loop_index,
            {kind: _picked_mask(mask, rows, tokens, length) for kind, mask in self.masks.items()},
            [None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.memories],
            past_key_values=self.keys,
            **self._picked_shared(rows, tokens),
        )
        self.state[at] = torch.where(active[at][..., None], update, state)
        self.computed_tokens += tokens.numel()

    def _freeze(self, stopped: Tensor) -> None:
        """Give the tokens of ``stopped`` ``[B, T]``, which halted in the last loop, the keys of their frozen state."""
        rows, tokens = stopped.nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        at = (rows[:, None], tokens[:, None])
        shared = self._picked_shared(rows, tokens[:, None])
        pair = self.core.frozen_keys(self.state[at], self.h0[at], shared["position_embeddings"])
        self.keys.freeze(rows, tokens[:, None], pair)

    def _picked_shared(self, rows: Tensor, tokens: Tensor) -> dict[str, Any]:
        picked = dict(self.shared)
        cos, sin = self.shared["position_embeddings"]
        picked["position_embeddings"] = (_picked(cos, rows, tokens), _picked(sin, rows, tokens))
        picked["position_ids"] = _picked(self.shared["position_ids"], rows, tokens)
        if (resets := self.shared.get("resets")) is not None:
            picked["resets"] = resets[rows]
        return picked

    def retained(self) -> tuple[Tensor, ...]:
        """The states ``[B, T, H]`` that ``config.state_retention`` keeps, of the loops that ran."""
        config = self.core.config
        chosen = config.selected_states if config.state_retention == "selected" else range(1, len(self.states) + 1)
        return tuple(self.states[loop - 1] for loop in chosen if loop <= len(self.states))

    def is_finite(self) -> Tensor:
        """Bool ``[B, T]``: tokens whose state is finite."""
        return torch.isfinite(self.state.detach()).all(dim=-1)

    @torch.no_grad()
    def measure(self, names: frozenset[str], loop: int) -> dict[str, Tensor]:
        """The signals ``names`` of the loop just run; those that a value head reads are measured too.

        Returns:
            Each ``[B, T]``, or ``[B, 1]`` when rows decide: the largest over the real tokens of the row, except that
            confidence, margin and entropy are those of its last real token.
        """
        wanted, head = set(names), self.value_head if "predicted_gain" in names else None
        wanted |= set(() if head is None else head.feature_names)
        found: dict[str, Tensor] = {}
        if "hidden_delta" in wanted:
            found["hidden_delta"] = hidden_delta(self.state, self.previous)
        if "relative_delta" in wanted:
            found["relative_delta"] = relative_delta(self.state, self.previous)
        if "state_norm" in wanted:
            found["state_norm"] = state_norm(self.state)
        if "h0_norm" in wanted:
            found["h0_norm"] = state_norm(self.h0)
        if wanted & _PROBED:
            found |= self._probed(wanted, is_by_token=not self.reduces_rows or head is not None)
        if head is not None:
            name = head.output_kind if head.output_kind in _VALUE_FIELDS else "predicted_gain"
            found[name] = head.predict(self.state, loop, self.is_real, found)
            names = (names - {"predicted_gain"}) | {name}
        return {name: self._reduced(name, found[name]) for name in sorted(names)}

    def _probed(self, wanted: set[str], *, is_by_token: bool) -> dict[str, Tensor]:
        assert self.probe is not None
        last_only = not is_by_token and not wanted & {"prediction_change"}
        log_probs = log_probabilities(self.probe(self.state, last_only))
        self.num_probes += 1
        found = {}
        if "prediction_change" in wanted:
            before, self._log_probs = self._log_probs, log_probs
            found["prediction_change"] = prediction_change(before, log_probs)
        for name in sorted(wanted & _AT_LAST_TOKEN):
            found[name] = {"confidence": confidence, "margin": margin, "entropy": entropy}[name](log_probs)
        return found

    def _reduced(self, name: str, values: Tensor) -> Tensor:
        if not self.reduces_rows or values.shape[1] == 1:
            return values
        if name in _AT_LAST_TOKEN:
            return values.gather(1, last_real_token(self.is_real)[:, None])
        return row_maximum(values, self.is_real)[:, None]

    def finish(self, loops: Tensor) -> None:
        """Hand the keys of the call to the cache; ``loops`` ``[B, T]`` were run."""
        resets = self.shared.get("resets")
        self.computed_tokens += self.keys.made_up_tokens
        self.keys.commit_states(loops, self.core.entered(self.state, self.h0), resets)
        if self.core.state_layer is not None:
            return
        frozen = None
        if self._stores_frozen or self.keys.num_loops == 0:
            frozen = [self.core.frozen_keys(self.state, self.h0, self.shared["position_embeddings"])]
        every = self.keys.num_loops
        self.keys.commit(loops, torch.full_like(loops, every) if self.runs_all_loops else loops, frozen)


def _groups(sizes: list[int], allowance: int) -> list[tuple[int, int]]:
    """Where to cut rows of falling ``sizes``, so that filling the rows of a group up to its first adds little.

    Args:
        allowance: tokens that may be added to a group however small it is.
    """
    starts, added, total = [0], 0, 0
    for index, size in enumerate(sizes):
        added, total = added + sizes[starts[-1]] - size, total + size
        if added > max(_FILL_SHARE * total, allowance):
            starts.append(index)
            added, total = 0, size
    return list(zip(starts, [*starts[1:], len(sizes)], strict=True))


def _free_tokens(config: Any, num_keys: int) -> int:
    """Tokens that can be computed in the time in which a group of rows is started."""
    return _START_FLOPS // core_flops_per_token(config, num_keys)


def _picked(values: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """``values`` ``[B or 1, T, ...]`` at ``tokens`` of ``rows``."""
    return values[0][tokens] if values.shape[0] == 1 else values[rows[:, None], tokens]


def _picked_mask(mask: Tensor | None, rows: Tensor, tokens: Tensor, length: int) -> Tensor | None:
    """The mask of the chosen rows and queries; ``[B, S]`` masks hold for all queries."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[rows]
    mask = mask if mask.shape[0] == 1 else mask[rows]
    if tokens.shape[1] == length:
        return mask
    index = tokens[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return mask.expand(len(rows), *mask.shape[1:]).gather(2, index)
