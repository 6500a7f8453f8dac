"""How many loops a call runs, decided once at its start.

A request may give ``loop_mode``, ``num_loops``, ``min_loops``, ``max_loops`` and ``allow_extrapolation``; what it
leaves out comes from the configuration. Bounds are hard: a number outside [min_loops, max_loops] is an error, never a
silent clamp, unless ``allow_extrapolation`` lifts the upper bound. Runs beyond ``trained_max_loops`` are labelled as
extrapolated.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch

from cognexis.configuration_rules import HARD_MAX_LOOPS, nearest_name
from cognexis.errors import InvalidConfigError

LOOP_MODES = ("fixed",)
LOOP_KEYWORDS = (
    "loop_mode",
    "num_loops",
    "min_loops",
    "max_loops",
    "allow_extrapolation",
    "return_loop_stats",
)


@dataclass(frozen=True)
class LoopOptions:
    """The loops of one call, checked against the configuration.

    Attributes:
        loop_mode: "fixed": every row runs ``num_loops`` loops.
        num_loops: loops to run.
        requested_loops: what the call asked for; larger than ``num_loops`` only while a draft model is capped.
        min_loops: lower bound in force.
        max_loops: upper bound in force.
        extrapolated: more loops than the weights were trained with.
    """

    loop_mode: str
    num_loops: int
    requested_loops: int
    min_loops: int
    max_loops: int
    extrapolated: bool


def loop_count(name: str, value: Any) -> int:
    """Return ``value`` as a loop count of at least 1.

    Args:
        name: name of the argument, for the message.
        value: an int, or an integer tensor without axes.

    Raises:
        InvalidConfigError: another type, a tensor with axes, or a number below 1.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim != 0 or value.dtype.is_floating_point or value.dtype in (torch.bool, torch.complex64):
            raise InvalidConfigError(
                f"{name}: a tensor must hold one integer and have no axes, got {value.dtype} {tuple(value.shape)}",
                path=name,
                value=value,
            )
        value = value.item()
    try:
        number = operator.index(value) if not isinstance(value, bool) else 0
    except TypeError:
        number = 0
    if not 1 <= number <= HARD_MAX_LOOPS:
        raise InvalidConfigError(
            f"{name}={value!r}: must be an integer between 1 and {HARD_MAX_LOOPS}", path=name, value=value
        )
    return number


def resolve_loop_options(
    config: Any,
    *,
    loop_mode: str | None = None,
    num_loops: Any = None,
    min_loops: Any = None,
    max_loops: Any = None,
    allow_extrapolation: bool | None = None,
) -> LoopOptions:
    """Combine a call's arguments with the configuration; arguments left at None come from there.

    Raises:
        InvalidConfigError: an unknown mode, a count of the wrong type, or a count outside the bounds.
    """
    mode = "fixed" if loop_mode is None else loop_mode
    if mode not in LOOP_MODES:
        raise InvalidConfigError(
            f"loop_mode={mode!r}: must be one of {', '.join(LOOP_MODES)}", path="loop_mode", value=mode
        )
    if allow_extrapolation not in (None, True, False):
        raise InvalidConfigError(
            f"allow_extrapolation={allow_extrapolation!r}: must be True or False", path="allow_extrapolation"
        )
    low = config.min_loops if min_loops is None else loop_count("min_loops", min_loops)
    high = config.max_loops if max_loops is None else loop_count("max_loops", max_loops)
    if max_loops is not None and high > config.max_loops and not allow_extrapolation:
        raise InvalidConfigError(
            f"max_loops={high}: above the configuration's max_loops={config.max_loops}; pass allow_extrapolation=True "
            "to go beyond it",
            path="max_loops",
            value=high,
        )
    if low > high:
        raise InvalidConfigError(f"min_loops={low}: must not exceed max_loops={high}", path="min_loops", value=low)
    if num_loops is not None:
        loops = loop_count("num_loops", num_loops)
    else:  # the configuration's default, moved inside bounds that the call has narrowed
        loops = min(max(config.default_loops, low), high)
    if loops < low or (loops > high and not (allow_extrapolation and max_loops is None)):
        hint = "" if loops < low or max_loops is not None else "; pass allow_extrapolation=True to go beyond it"
        raise InvalidConfigError(
            f"num_loops={loops}: must lie between min_loops={low} and max_loops={high}{hint}",
            path="num_loops",
            value=loops,
        )
    cap = config.loop_cap
    return LoopOptions(
        loop_mode=mode,
        num_loops=loops if cap is None else min(loops, cap),
        requested_loops=loops,
        min_loops=low,
        max_loops=max(high, loops),
        extrapolated=loops > config.trained_max_loops,
    )


def refuse_misspelt(names: Any, known: Any = LOOP_KEYWORDS) -> None:
    """Raise for a keyword that is almost one of ours; model forwards would swallow it without a word.

    Raises:
        InvalidConfigError: a name holds "loop", or is close to a loop keyword, without being one.
    """
    for name in names:
        near = nearest_name(name, known, cutoff=0.8)
        if name not in known and ("loop" in name or near):
            raise InvalidConfigError(f"unknown argument {name!r}{near or nearest_name(name, known, 0.3)}", path=name)
