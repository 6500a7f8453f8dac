"""The largest loop count of an optimizer step.

    m(step) = initial                                                step < warmup_steps
    m(step) = initial + floor((target - initial) f(p))               p = min(1, (step - warmup_steps) / ramp_steps)

    linear       f(p) = p
    cosine       f(p) = (1 - cos(pi p)) / 2
    exponential  f(p) = (B^p - 1) / (B - 1)
    milestone    m(step) = the maximum of the last milestone at or before the step, at first the initial one

``ramp_steps = 0`` reaches the target at once. The floor takes 1e-9 too little for whole, so that rounding errors of f
do not delay a step.
"""

import math
from collections.abc import Callable

from cognexis.training.curriculum.settings import CurriculumSettings

RAMP_SHAPES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda p, base: p,
    "cosine": lambda p, base: (1.0 - math.cos(math.pi * p)) / 2.0,
    "exponential": lambda p, base: (base**p - 1.0) / (base - 1.0),
}


def ramp_progress(settings: CurriculumSettings, step: int) -> float:
    """p of the module docstring, 0 to 1; a curriculum without warm-up and ramp is at 1 from the start."""
    if settings.mode == "fixed":
        return 1.0
    if step < settings.warmup_steps:
        return 0.0
    if settings.ramp_steps == 0:
        return 1.0
    return min(1.0, (step - settings.warmup_steps) / settings.ramp_steps)


def maximum_at(settings: CurriculumSettings, step: int) -> int:
    """m(step), never above the target."""
    if settings.mode == "fixed":
        return settings.target_max_loops
    initial, target = settings.initial_max_loops, settings.target_max_loops
    if step < settings.warmup_steps:
        return initial
    if settings.ramp == "milestone":
        reached = [maximum for start, maximum in settings.milestones.items() if start <= step]
        return max(reached, default=initial)
    share = RAMP_SHAPES[settings.ramp](ramp_progress(settings, step), settings.exponential_base)
    return min(target, initial + math.floor((target - initial) * share + 1e-9))
