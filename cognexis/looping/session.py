"""What a generation remembers about its request from pass to pass: ended rows, budgets, risk.

One session belongs to one ``generate`` call whose rows may run different numbers of loops or have budgets; the model
reads it in every forward. Letters: B rows.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cognexis.looping.budget import RequestBudget
from cognexis.looping.cost import core_flops_per_token, loop_state_bytes, token_bytes
from cognexis.looping.trace import LoopRecorder


@dataclass
class LoopSession:
    """The state of one request.

    Attributes:
        request_id: name of the request.
        budget: what may still be used; None without limits.
        finished: bool ``[B]``, rows that have ended and run no more loops; None while none has.
        is_risky: bool ``[B, 1]``, rows that a safety rule stops; None without such a rule.
        num_passes: forwards that were begun.
        keeps_record: whether the scheduler's summary of the request is wanted.
        sequences: ``[B, tokens]`` before the pass at hand, once new tokens exist; None before.
        spent: bool ``[B]``, rows that ended for lack of budget; None while none has.
        beams: beams of each prompt and how many of them are returned; (1, 1) without beam search.
    """

    request_id: str = "generate"
    budget: RequestBudget | None = None
    finished: Tensor | None = None
    is_risky: Tensor | None = None
    num_passes: int = 0
    keeps_record: bool = False
    sequences: Tensor | None = None
    spent: Tensor | None = None
    beams: tuple[int, int] = (1, 1)
    _cache: Any = field(default=None, repr=False)
    _prompt_length: int | None = field(default=None, repr=False)

    @property
    def is_first_pass(self) -> bool:
        """Whether the pass at hand is the first."""
        return self.num_passes <= 1

    @property
    def is_reading_prompt(self) -> bool:
        """Whether the pass at hand reads the prompt, or a part of it."""
        return self.sequences is None

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of keys and values at the last pass; None without a cache that can say."""
        return self._cache.memory_bytes() if hasattr(self._cache, "memory_bytes") else None

    def begin_pass(self, input_ids: Tensor, cache: Any) -> None:
        """A forward over the last of ``input_ids`` ``[B, tokens]`` starts."""
        self.num_passes += 1
        self._cache = cache
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1]
        elif input_ids.shape[1] > self._prompt_length:
            self.sequences = input_ids

    def loops_that_fit(self, config: Any, cache: Any, rows: int, new_tokens: int, itemsize: int) -> int | None:
        """Most loops for which the keys of ``new_tokens`` more tokens in ``rows`` rows fit into the cache's limit.

        None without a limit; with several core blocks every token keeps all loops of the cache, which fit or do not.
        """
        limit = None if self.budget is None else self.budget.limits.max_cache_memory_bytes
        if limit is None or cache is None:
            return None
        without_loops = token_bytes(config, 0, itemsize)
        left = limit - cache.memory_bytes() - rows * new_tokens * without_loops
        per_loop = rows * new_tokens * (token_bytes(config, 1, itemsize) - without_loops)
        if per_loop == 0:  # a core without keys: only loops that no token has run yet take memory
            known = len(getattr(cache.depth_layers[0], "states", ()))
            new_loops = left // max(1, rows * loop_state_bytes(config, itemsize))
            return 0 if left < 0 else known + new_loops
        loops = max(0, left // per_loop)
        if config.num_recurrent_blocks == 1:
            return loops
        return None if cache.num_loops is None else cache.num_loops * (loops + 1 >= cache.num_loops)

    def is_spent(self, config: Any, min_loops: int, num_tokens: int) -> Tensor | None:
        """Bool ``[B]``: rows whose next token, number ``num_tokens`` + 1, cannot run ``min_loops`` loops.

        With several core blocks it must run all that the cache holds of every token.
        """
        if (budget := self.budget) is None:
            return None
        if config.num_recurrent_blocks > 1:
            min_loops = getattr(self._cache, "num_loops", None) or min_loops
        new_tokens = num_tokens if self._cache is None else 1
        flops = new_tokens * core_flops_per_token(config, num_tokens, new_tokens)
        spent = ~budget.affords(min_loops, flops)
        slot = None if self._cache is None else self._cache.layers[0]
        if slot is not None and slot.is_initialized:
            fitting = self.loops_that_fit(config, self._cache, len(spent), 1, slot.dtype.itemsize)
            spent = spent | (fitting is not None and fitting < min_loops)
        return torch.ones_like(spent) if budget.is_late(min_loops) else spent

    def share_among_beams(self, num_beams: int, num_returned: int) -> None:
        """Rows are beams, which continue each other: the budget of each is that of all."""
        self.beams = (num_beams, num_returned)
        if self.budget is not None:
            self.budget.is_shared = True

    @property
    def kept_rows(self) -> Tensor | None:
        """Indices ``[R]`` of the rows to return when the request ends early; None while it has no new tokens.

        The beams of a prompt stand next to each other, the best first.
        """
        if self.sequences is None:
            return None
        num_beams, num_returned = self.beams
        return torch.arange(self.sequences.shape[0]).view(-1, num_beams)[:, :num_returned].flatten()

    def abandon_pass(self, recorder: LoopRecorder | None) -> None:
        """The pass at hand yields no token for lack of budget: all rows end."""
        if self.sequences is not None:
            self.note_spent(torch.ones(self.sequences.shape[0], dtype=torch.bool))
        if recorder is not None:
            recorder.abandon_pass()

    def note_spent(self, rows: Tensor) -> None:
        """``rows`` ``[B]`` end for lack of budget."""
        self.spent = rows.cpu() if self.spent is None else self.spent | rows.cpu()

    def was_spent(self, row: int) -> bool:
        """Whether ``row`` ended for lack of budget."""
        return self.spent is not None and bool(self.spent[row % len(self.spent)])
