"""Observations for tests of schedulers: with every signal, as random numbers or as given."""

from typing import Any

import torch

from cognexis.looping.schedulers.base import LoopObservation, LoopScheduler, SchedulerContext

SIGNALS = (
    *("hidden_delta", "relative_delta", "state_norm", "confidence", "margin", "entropy"),
    *("prediction_change", "predicted_gain", "continue_logit", "uncertainty"),
)


def observation(loops: int, *, min_loops: int = 1, max_loops: int = 8, **fields: Any) -> LoopObservation:
    """One observation; numbers become tensors without axes, lists become ``[B]``."""
    as_is = ("remaining_loops", "remaining_flops", "remaining_ms", "preference")
    tensors = {name: value if name in as_is else torch.as_tensor(value) for name, value in fields.items()}
    return LoopObservation(loops=loops, min_loops=min_loops, max_loops=max_loops, **tensors)


def random_observation(loops: int, shape: tuple[int, ...], seed: int, **fields: Any) -> LoopObservation:
    """All signals, small enough that every rule sometimes holds, and now and then NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    signals = {name: torch.rand(shape, generator=generator) for name in SIGNALS}
    signals["relative_delta"] = signals["relative_delta"] * 0.1
    signals["predicted_gain"] = signals["predicted_gain"] * 1e-3
    signals["continue_logit"] = signals["continue_logit"] * 4 - 2
    for values in signals.values():
        odd = torch.rand(shape, generator=generator)
        values[odd < 0.05] = torch.nan
        values[odd > 0.97] = torch.inf
    return observation(loops, **signals, **fields)


def context(**fields: Any) -> SchedulerContext:
    return SchedulerContext(**{"request_id": "r", "min_loops": 1, "max_loops": 8} | fields)


def answers(scheduler: LoopScheduler, *observations: LoopObservation) -> list[tuple[str, str | None]]:
    """Action and reason after each observation of one slot, in one request."""
    scheduler.begin_request(context())
    decisions = [scheduler.observe(each) for each in observations]
    return [(decision.action, decision.halt_reason) for decision in decisions]


def halts(scheduler: LoopScheduler, name: str, values: list[float], **others: Any) -> list[bool]:
    """Whether the scheduler halts after loops 1, 2, ... of one slot whose signal ``name`` has these values."""
    seen = [observation(i, max_loops=99, **{name: v}, **others) for i, v in enumerate(values, start=1)]
    return [action == "halt" for action, _ in answers(scheduler, *seen)]
