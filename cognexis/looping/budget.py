"""Hard limits of a request: core applications, recurrent FLOPs, wall time, cache bytes.

Every row of a request has the limits to itself, except wall time and cache bytes, which the request shares. One core
application of a pass is one unit of ``max_total_loops``; where the tokens of a pass differ, the deepest counts. The
recurrent FLOPs of a row in a pass are

    sum over tokens of loops * (2 * matrix parameters of the core + 4 * N * D * keys)

with N query heads, D head width and the keys of the last token. A loop is started only if it fits, so counted limits
are never exceeded; wall time by at most the loop that runs when it ends. Letters: B rows, T tokens.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError

_SMOOTHING = 0.3


@dataclass(frozen=True)
class BudgetLimits:
    """Limits of a request; None means no limit.

    Attributes:
        max_total_loops: core applications of a row, prompt included.
        max_loops_per_token: loops of one token.
        max_recurrent_flops: floating-point operations of a row in the core.
        max_wall_time_ms: milliseconds from the start of the request.
        max_cache_memory_bytes: bytes of keys and values of the whole request.

    Raises:
        InvalidConfigError: a limit that is no positive number (whole, except for FLOPs and time).
    """

    max_total_loops: int | None = None
    max_loops_per_token: int | None = None
    max_recurrent_flops: float | None = None
    max_wall_time_ms: float | None = None
    max_cache_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name not in ("max_recurrent_flops", "max_wall_time_ms")
            kinds: Any = int if whole else (int, float)
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < math.inf):
                kind = "an integer" if whole else "a number"
                raise InvalidConfigError(
                    f"{field.name}={value!r}: must be {kind} above 0, or None", path=field.name, value=value
                )

    @property
    def is_limiting(self) -> bool:
        """Whether anything is limited beyond the loops of a token."""
        return any(getattr(self, f.name) is not None for f in fields(self) if f.name != "max_loops_per_token")


BUDGET_KEYWORDS = tuple(field.name for field in fields(BudgetLimits))


class RequestBudget:
    """What the rows of a request have used, and whether they can go on.

    Args:
        limits: see :class:`BudgetLimits`.
        clock: seconds that only rise.

    Attributes:
        loops_used: ``[B]`` core applications; empty before the first pass.
        flops_used: ``[B]`` recurrent FLOPs.
        is_shared: rows may continue each other (beams), so a pass costs each of them what the dearest costs.
    """

    def __init__(self, limits: BudgetLimits, clock: Callable[[], float] = time.perf_counter) -> None:
        self.limits = limits
        self.clock = clock
        self.loops_used = torch.zeros(0, dtype=torch.long)
        self.flops_used = torch.zeros(0, dtype=torch.float64)
        self.is_shared = False
        self.loop_seconds = 0.0  # moving average
        wall = limits.max_wall_time_ms
        self.deadline = None if wall is None else clock() + wall / 1000

    def begin_pass(
        self, rows: int, device: torch.device, flops_per_loop: float, max_loops: int | None
    ) -> "PassBudget":
        """A pass over ``rows`` rows starts.

        Args:
            rows: B; a number other than before (beams) keeps the count of the row that used most.
            device: where the loops run.
            flops_per_loop: FLOPs of one token in one loop.
            max_loops: most loops that the cache has room for, or None.
        """
        if self.loops_used.shape[0] != rows:
            used, flops = self.loops_used, self.flops_used
            self.loops_used = used.new_full((rows,), int(used.max()) if len(used) else 0).to(device)
            self.flops_used = flops.new_full((rows,), float(flops.max()) if len(flops) else 0.0).to(device)
        return PassBudget(self, flops_per_loop, max_loops)

    def affords(self, loops: int, flops: float) -> Tensor:
        """Bool ``[B]``: rows that can run ``loops`` more loops of ``flops`` each."""
        can = torch.ones_like(self.loops_used, dtype=torch.bool)
        if (most := self.limits.max_total_loops) is not None:
            can &= self.loops_used + loops <= most
        if (most_flops := self.limits.max_recurrent_flops) is not None:
            can &= self.flops_used + loops * flops <= most_flops
        return can

    def is_late(self, loops: int = 1) -> bool:
        """Whether ``loops`` more loops would end after the deadline."""
        return self.deadline is not None and self.clock() + loops * self.loop_seconds >= self.deadline

    def time_loop(self, seconds: float) -> None:
        """Learn how long a loop takes."""
        old = self.loop_seconds
        self.loop_seconds = seconds if old == 0.0 else (1 - _SMOOTHING) * old + _SMOOTHING * seconds

    @property
    def remaining_ms(self) -> float | None:
        """Milliseconds to the deadline; None without one."""
        return None if self.deadline is None else (self.deadline - self.clock()) * 1000


@dataclass
class PassBudget:
    """The budget as one forward pass sees it."""

    request: RequestBudget
    flops_per_loop: float
    max_loops: int | None

    def remaining_loops(self, loops: Tensor, active: Tensor) -> Tensor | None:
        """Loops ``[B, 1]`` that each row may still start; None without a limit.

        Args:
            loops: ``[B, T]`` loops run in this pass.
            active: ``[B, T]`` tokens that would run the next one.
        """
        limits, left = self.request.limits, []
        if limits.max_total_loops is not None:
            left.append(limits.max_total_loops - self.request.loops_used - loops.amax(dim=1))
        if self.max_loops is not None:
            left.append(self.max_loops - loops.amax(dim=1))
        if limits.max_recurrent_flops is not None:
            used = self.request.flops_used + loops.sum(dim=1) * self.flops_per_loop
            step = active.sum(dim=1).clamp(min=1) * self.flops_per_loop
            left.append(((limits.max_recurrent_flops - used) / step).floor().long())
        return torch.stack(left).amin(dim=0)[:, None] if left else None

    def charge(self, loops: Tensor) -> None:
        """Count the pass: ``loops`` ``[B, T]`` were run."""
        applications, tokens = loops.amax(dim=1), loops.sum(dim=1)
        if self.request.is_shared:
            applications, tokens = applications.amax().expand_as(applications), tokens.amax().expand_as(tokens)
        self.request.loops_used = self.request.loops_used + applications
        self.request.flops_used = self.request.flops_used + tokens * self.flops_per_loop
