"""The loop over loops: runs a core until every token has stopped, and holds every run to its bounds.

One place decides about hard limits, and no scheduler can write to it. After each loop, in this order: a state that is
not finite, safety, budget and the largest number of loops stop a token whatever a scheduler says; below the smallest
number of loops nothing else does; then the scheduler's rule, as far as the dependency lets it (see ``token_mask``).
A pass for whose smallest number of loops a counted budget has no room is not begun.

Decisions stay on the device. The host needs to know whether anything still runs: on a CPU it looks at once, elsewhere
at a flag that was copied while the previous loop ran, so it never waits for the loop at hand and a run may compute one
loop more than it keeps. Letters: B rows, T tokens, L loops.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from cognexis.errors import BudgetExceededError
from cognexis.looping.budget import PassBudget
from cognexis.looping.schedulers.base import LoopDecision, LoopObservation, LoopScheduler, reason_code
from cognexis.looping.schedulers.guard import apply_bounds, scheduler_fault
from cognexis.looping.token_mask import HaltState, may_halt


class LoopedCore(Protocol):
    """What the driver needs of a core."""

    runs_all_loops: bool  # deeper keys of stopped tokens must be computed, so every token costs the largest number
    waits: bool  # reads decisions on the host in every loop anyway

    def advance(self, loop_index: int, active: Tensor) -> None:
        """Run loop ``loop_index`` (from 0) for the tokens of ``active`` ``[B, T]``; others keep their state."""

    def measure(self, signals: frozenset[str], loop: int) -> dict[str, Tensor]:
        """Signals of the loop just run, each ``[B, T]``, or ``[B, 1]`` where a row decides as a whole."""

    def is_finite(self) -> Tensor:
        """Bool ``[B, T]``: tokens whose state is finite."""


@dataclass(frozen=True)
class LoopBounds:
    """The bounds of a run.

    Attributes:
        min_loops: fewest loops of a token.
        max_loops: most loops of any token.
        limits: ``[B, 1]`` most loops by row, at most ``max_loops``; None where it holds for all.
    """

    min_loops: int
    max_loops: int
    limits: Tensor | None = None


@dataclass
class LoopTrace:
    """What happened by loop, on the device.

    Attributes:
        active: per loop the number of tokens that ran it.
        signals: per loop the mean of each signal over the tokens that ran it.
    """

    active: list[Tensor] = field(default_factory=list)
    signals: dict[str, list[Tensor]] = field(default_factory=dict)

    def note(self, ran: Tensor, signals: dict[str, Tensor]) -> None:
        self.active.append(ran.sum())
        for name, values in signals.items():
            weights = ran if values.shape == ran.shape else ran.any(dim=1, keepdim=True)
            mean = torch.where(weights, values.float(), 0.0).sum() / weights.sum().clamp(min=1)
            self.signals.setdefault(name, []).append(mean)


class LateFlag:
    """A flag of the device, read one step late without waiting for the step at hand."""

    def __init__(self) -> None:
        self._slots: list[tuple[Tensor, Any]] = []

    def push(self, flag: Tensor) -> bool | None:
        """Start copying ``flag``; returns the one pushed before, None the first time."""
        copy = torch.empty((), dtype=torch.bool, pin_memory=True)
        copy.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._slots.append((copy, event))
        if len(self._slots) == 1:
            return None
        value, before = self._slots.pop(0)
        before.synchronize()
        return bool(value)


def run_loops(
    core: LoopedCore,
    takes_part: Tensor,
    bounds: LoopBounds,
    scheduler: LoopScheduler | None = None,
    *,
    dependency: str = "token",
    settled_after: Tensor | None = None,
    budget: PassBudget | None = None,
    is_risky: Tensor | None = None,
    quality_tier: str | None = None,
    trace: LoopTrace | None = None,
) -> HaltState:
    """Run ``core`` until every token of ``takes_part`` ``[B, T]`` has stopped.

    Args:
        core: computes and measures.
        takes_part: bool; padding and rows that have ended are False and run nothing.
        bounds: smallest and largest number of loops.
        scheduler: the soft rule; without one every token runs to its largest number.
        dependency: whose agreement a token needs to stop, see ``token_mask``.
        settled_after: ``[B, 1]`` loops before which earlier tokens, outside this run, do not show their final state;
            no rule stops a token of the row before.
        budget: limits of the request, charged with what was run.
        is_risky: bool ``[B, 1]``, rows that must stop now.
        quality_tier: handed to the scheduler.
        trace: filled by loop when given.

    Returns:
        Loops and halt reasons of every token.

    Raises:
        BudgetExceededError: the budget has no room for the smallest number of loops, or time ends before.
        InvalidConfigError, ShapeMismatchError: the scheduler's answer is no decision about what it was shown.
        BackendError: the scheduler failed.
    """
    state = HaltState.begin(takes_part)
    if budget is not None:
        _require_room(budget, state, bounds.max_loops if core.runs_all_loops else bounds.min_loops)
    signals = scheduler.signals if scheduler is not None else frozenset[str]()
    is_host = takes_part.device.type == "cpu" or core.waits
    has_deadline = budget is not None and budget.request.deadline is not None
    late = None if is_host or has_deadline else LateFlag()
    clock: Callable[[], float] = time.perf_counter if budget is None else budget.request.clock
    for loop in range(1, bounds.max_loops + 1):
        start = clock()
        ran = state.active
        core.advance(loop - 1, ran)
        state.count()
        measured = core.measure(signals, loop)
        if trace is not None:
            trace.note(ran, measured)
        _decide(
            state,
            ran,
            loop,
            core,
            measured,
            bounds,
            scheduler,
            dependency,
            settled_after,
            budget,
            is_risky,
            quality_tier,
        )
        if budget is not None and budget.request.deadline is not None:
            budget.request.time_loop(clock() - start)
            if budget.request.is_late() and loop < bounds.max_loops:
                _require_minimum(state, bounds.min_loops, is_complete=not core.runs_all_loops)
                state.halt(state.active, _code("budget", state.reasons))
        if core.runs_all_loops:
            continue
        running = state.active.any()
        if late is None:
            if not bool(running):
                break
        elif late.push(running) is False:
            break
    if budget is not None:
        budget.charge(takes_part * bounds.max_loops if core.runs_all_loops else state.loops)
    return state


def _decide(
    state: HaltState,
    ran: Tensor,
    loop: int,
    core: LoopedCore,
    measured: dict[str, Tensor],
    bounds: LoopBounds,
    scheduler: LoopScheduler | None,
    dependency: str,
    settled_after: Tensor | None,
    budget: PassBudget | None,
    is_risky: Tensor | None,
    quality_tier: str | None,
) -> None:
    """Stop what has to stop after ``loop``, which the tokens ``ran`` ``[B, T]`` went through."""
    left = None if budget is None else budget.remaining_loops(state.loops, state.active)
    shape = next((values.shape for values in measured.values()), torch.Size((state.active.shape[0], 1)))
    observation = LoopObservation(
        loops=loop,
        min_loops=bounds.min_loops,
        max_loops=bounds.max_loops,
        remaining_loops=None if left is None else left.expand(shape),
        is_risky=None if is_risky is None else is_risky.expand(shape),
        is_active=ran if shape == ran.shape else ran.any(dim=1, keepdim=True),
        preference=quality_tier,
        **measured,  # type: ignore[arg-type]
    )
    if scheduler is None:
        nothing = torch.zeros(shape, dtype=torch.bool, device=state.active.device)
        decision = apply_bounds(observation, LoopDecision(nothing, nothing.to(torch.int8)))
    else:
        with scheduler_fault(scheduler, "observe", loop):
            answer = scheduler.observe(observation)
        decision = apply_bounds(observation, answer)
    halt, reasons = decision.halt.expand_as(state.active), decision.reasons.expand_as(state.active)
    is_hard = (reasons == reason_code("safety")) | (reasons == reason_code("budget"))
    if loop >= bounds.max_loops:
        is_hard = torch.ones_like(halt)
    state.halt(~core.is_finite(), _code("error", state.reasons))
    state.halt(halt & is_hard, reasons)
    if bounds.limits is not None:
        state.halt(loop >= bounds.limits, _code("max_loops", state.reasons))
    if scheduler is not None:
        settled = halt & ~is_hard
        if settled_after is not None:
            settled = settled & (loop >= settled_after)
        state.halt(settled & may_halt(settled, state.active, dependency), reasons)


def _code(name: str, like: Tensor) -> Tensor:
    return torch.full_like(like, reason_code(name))


def _require_room(budget: PassBudget, state: HaltState, loops: int) -> None:
    """Refuse a pass in which a row cannot run the ``loops`` that every token costs at least."""
    left = budget.remaining_loops(state.loops, state.active)
    if left is not None and bool((state.active & (left < loops)).any()):
        raise BudgetExceededError(f"budget: no room left for {loops} more loops of a row, the fewest of a pass")


def _require_minimum(state: HaltState, min_loops: int, *, is_complete: bool) -> None:
    """Refuse a pass whose time ended below the minimum, or without the loops its keys need: it yields no token."""
    if not is_complete or bool((state.active & (state.loops < min_loops)).any()):
        what = f"min_loops={min_loops} loops" if is_complete else "all loops of several core blocks"
        raise BudgetExceededError(f"max_wall_time_ms: exhausted before {what} were run")
