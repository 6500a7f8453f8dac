"""The hard rules that no scheduler can pass: the one place where bounds and budgets are enforced.

In this order, each for every slot by itself:

    is_risky                                     -> halt, safety
    no loops, operations or milliseconds left    -> halt, budget
    loops >= max_loops                           -> halt, max_loops
    loops < min_loops                            -> continue, with the note min_loops_not_met
    otherwise                                    -> what the scheduler says

A budget that is no number counts as used up. A scheduler's own halt may carry the reasons min_delta, confidence,
value_gain, max_loops (a fixed depth that is reached) and forced; any other becomes forced, so that "safety" and
"budget" always mean that the rule above struck.

Source: contract D-04, SCH-04, SCH-14.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import BackendError, CognexisError, InvalidConfigError, ShapeMismatchError
from cognexis.looping.schedulers.base import (
    HALT_REASONS,
    NO_REASON,
    LoopDecision,
    LoopObservation,
    LoopScheduler,
    reason_code,
)

_MIN_LOOPS_NOT_MET = reason_code("min_loops_not_met")
_MAX_LOOPS = reason_code("max_loops")
_BUDGET = reason_code("budget")
_SAFETY = reason_code("safety")
_FORCED = reason_code("forced")
_SOFT_REASONS = tuple(map(reason_code, ("min_delta", "confidence", "value_gain", "max_loops", "forced")))


@contextmanager
def scheduler_fault(scheduler: LoopScheduler, method: str, loop: int | None = None) -> Iterator[None]:
    """Name the scheduler whose ``method`` fails, after ``loop`` loops.

    Raises:
        BackendError: it raised something else than an error of ours, which is the cause.
    """
    try:
        yield
    except CognexisError:
        raise
    except Exception as error:
        name = getattr(scheduler, "name", type(scheduler).__name__)
        place = "" if loop is None else f" after loop {loop}"
        raise BackendError(
            f"scheduler={name!r}: {method}() failed{place} with {type(error).__name__}: {error}"
        ) from error


def apply_bounds(observation: LoopObservation, decision: Any) -> LoopDecision:
    """Return the decision that really holds; applying it twice changes nothing.

    Args:
        observation: bounds, budgets and risk, ``[slots]``.
        decision: what a scheduler returned; ``halt`` and ``reasons`` have the shape of the slots, or no axes.

    Raises:
        InvalidConfigError: no ``LoopDecision``, or tensors of the wrong type.
        ShapeMismatchError: a decision about other slots.
    """
    if not isinstance(decision, LoopDecision):
        message = f"a scheduler returned {type(decision).__name__}; observe() must return a LoopDecision"
        raise InvalidConfigError(message, path="scheduler", value=decision)
    halt = _of_slots("halt", decision.halt, observation)
    reasons = _of_slots("reasons", decision.reasons, observation)
    if halt.dtype != torch.bool or reasons.dtype.is_floating_point or reasons.dtype.is_complex:
        message = f"a scheduler returned halt of {halt.dtype} and reasons of {reasons.dtype}; must be bool and int8"
        raise InvalidConfigError(message, path="scheduler", value=decision)
    halt, reasons = torch.broadcast_tensors(halt, reasons)
    if observation.loops >= observation.max_loops:
        halt, reasons = torch.ones_like(halt), torch.full_like(reasons, _MAX_LOOPS, dtype=torch.int8)
    elif observation.loops < observation.min_loops:
        halt, reasons = torch.zeros_like(halt), torch.full_like(reasons, _MIN_LOOPS_NOT_MET, dtype=torch.int8)
    else:
        reasons = torch.where(halt, _legal(reasons), NO_REASON).to(torch.int8)
    if (used_up := _used_up(observation, halt)) is not None:
        halt, reasons = halt | used_up, torch.where(used_up, _BUDGET, reasons)
    if observation.is_risky is not None:
        is_risky = observation.is_risky.to(torch.bool)
        halt, reasons = halt | is_risky, torch.where(is_risky, _SAFETY, reasons)
    return LoopDecision(halt, reasons, decision.diagnostics)


def _used_up(observation: LoopObservation, like: Tensor) -> Tensor | None:
    """Slots, shaped as ``like``, without any budget left; None where no budget can be used up."""
    left = [observation.remaining_flops, observation.remaining_ms]
    loops = observation.remaining_loops
    if not isinstance(loops, Tensor):
        left.append(loops)
    if any(amount is not None and not amount > 0 for amount in left):
        return torch.ones_like(like)
    return ~(loops > 0) if isinstance(loops, Tensor) else None


def _legal(reasons: Tensor) -> Tensor:
    """Reasons that a scheduler may give; others become forced."""
    return _legal_table(reasons.device)[reasons.long().clamp(0, len(HALT_REASONS))]


@functools.cache
def _legal_table(device: torch.device) -> Tensor:
    """For every reason code the one that stands for it."""
    codes = [code if code in _SOFT_REASONS else _FORCED for code in range(len(HALT_REASONS) + 1)]
    return torch.tensor(codes, dtype=torch.int8, device=device)


def _of_slots(name: str, values: Any, observation: LoopObservation) -> Tensor:
    if not isinstance(values, Tensor):
        message = f"a scheduler returned {name} as {type(values).__name__}; must be a tensor"
        raise InvalidConfigError(message, path=f"scheduler.{name}", value=values)
    if values.ndim and observation.shape and values.shape != observation.shape:
        expected, actual = tuple(observation.shape), tuple(values.shape)
        message = f"a scheduler returned {name} of shape {actual}; the slots have {expected}"
        raise ShapeMismatchError(message, expected=expected, actual=actual)
    return values.to(observation.device or values.device).expand(observation.shape or values.shape)
