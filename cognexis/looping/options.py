"""How many loops a call may run, decided once at its start.

A request may give ``loop_mode``, ``num_loops``, ``min_loops``, ``max_loops`` and further settings; what it leaves out
comes from ``scheduler.json`` and the configuration. Bounds are hard: a number outside [min_loops, max_loops] is an
error, never a silent clamp, unless ``allow_extrapolation`` lifts the upper bound. Runs beyond ``trained_max_loops``
are labelled as extrapolated. In the adaptive modes a scheduler stops rows or tokens between the bounds, and never
passes the depth from which a checkpoint was measured to get worse, where that is recorded.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognexis.configuration_rules import HARD_MAX_LOOPS, nearest_name
from cognexis.errors import InvalidConfigError
from cognexis.looping.budget import BUDGET_KEYWORDS, BudgetLimits
from cognexis.looping.schedulers.base import LoopScheduler
from cognexis.looping.schedulers.registry import FIELD_ALIASES, build_scheduler, tier_settings
from cognexis.looping.token_mask import HALT_DEPENDENCIES

LOOP_MODES = ("fixed", "adaptive_sequence", "adaptive_token")
LOOP_MODE_ALIASES = {
    "adaptive": "adaptive_sequence",
    "token_adaptive": "adaptive_token",
    "tokenwise": "adaptive_token",
    "token_wise": "adaptive_token",
}
CACHE_POLICIES = ("depth_indexed", "last_exited", "modulo_k", "first_loop")
CALL_KEYWORDS = (
    "loop_mode",
    "num_loops",
    "min_loops",
    "max_loops",
    "scheduler",
    "quality_tier",
    "halt_dependency",
    "cache_policy",
    "allow_extrapolation",
)
"""What one forward takes to decide about its loops."""
REQUEST_KEYWORDS = (*CALL_KEYWORDS, *BUDGET_KEYWORDS, "speculative_draft_loops", "speculative_tokens")
LOOP_KEYWORDS = (*REQUEST_KEYWORDS, "return_loop_stats")
"""What ``generate`` takes."""
REQUEST_ALIASES = {
    "loop_budget": "max_loops",
    "total_loop_budget": "max_total_loops",
    "max_generated_tokens": "max_new_tokens",
}


@dataclass(frozen=True)
class LoopOptions:
    """The loops of one call, checked against the configuration.

    Attributes:
        loop_mode: "fixed": every row runs its number of loops; "adaptive_sequence": rows stop by a scheduler;
            "adaptive_token": tokens do.
        num_loops: most loops that run; in fixed mode the number of every row, unless ``row_loops`` is given.
        requested_loops: what the call asked for; larger than ``num_loops`` only while a draft model is capped.
        min_loops: lower bound in force.
        max_loops: upper bound in force.
        extrapolated: more loops than the weights were trained with may run.
        row_loops: ``[B]`` loops of each row in fixed mode; None where all are equal.
        scheduler: decides in the adaptive modes; None in fixed mode.
        quality_tier: "fast", "balanced", "thorough" or None.
        halt_dependency: "token", "prefix" or "row"; None in fixed mode and where the length of the call decides.
        cache_policy: how the keys of earlier tokens are kept.
        trained_max_loops: depth that the weights were trained with.
    """

    loop_mode: str
    num_loops: int
    requested_loops: int
    min_loops: int
    max_loops: int
    extrapolated: bool
    row_loops: Tensor | None = None
    scheduler: LoopScheduler | None = None
    quality_tier: str | None = None
    halt_dependency: str | None = None
    cache_policy: str = "depth_indexed"
    trained_max_loops: int = HARD_MAX_LOOPS

    @property
    def is_adaptive(self) -> bool:
        """Whether a scheduler decides."""
        return self.scheduler is not None

    @property
    def mixes_depths(self) -> bool:
        """Whether tokens may run different numbers of loops, or share keys between loops."""
        return self.is_adaptive or self.row_loops is not None or self.cache_policy != "depth_indexed"

    def dependency(self, length: int, is_prompt: bool = False) -> str:
        """Whose agreement a token needs to stop, in a call of ``length`` tokens, which may be a part of a prompt."""
        return self.halt_dependency or ("prefix" if length > 1 or is_prompt else "token")


def loop_count(name: str, value: Any) -> int:
    """Return ``value`` as a loop count of at least 1.

    Args:
        name: name of the argument, for the message.
        value: an int, or an integer tensor without axes.

    Raises:
        InvalidConfigError: another type, a tensor with axes, or a number below 1.
    """
    if isinstance(value, Tensor):
        if value.ndim != 0 or not _is_integer(value):
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


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def resolve_loop_options(
    config: Any,
    *,
    loop_mode: str | None = None,
    num_loops: Any = None,
    min_loops: Any = None,
    max_loops: Any = None,
    allow_extrapolation: bool | None = None,
    scheduler: Any = None,
    quality_tier: str | None = None,
    halt_dependency: str | None = None,
    cache_policy: str | None = None,
    default_scheduler: dict[str, Any] | None = None,
    default_dependency: str | None = None,
    overthinking_threshold: int | None = None,
) -> LoopOptions:
    """Combine a call's arguments with the checkpoint's; arguments left at None come from there.

    Args:
        default_scheduler: what ``scheduler.json`` says, used where the call names no scheduler or just this type; a
            "fixed" one leaves adaptive calls to the rule-based default.
        default_dependency: that for which the thresholds of ``default_scheduler`` were chosen.
        overthinking_threshold: depth at which adaptive runs end at the latest.

    Raises:
        InvalidConfigError: an unknown mode, policy or scheduler, a count of the wrong type or outside the bounds, or
            settings that the mode does not take.
    """
    mode = "fixed" if loop_mode is None else LOOP_MODE_ALIASES.get(loop_mode, loop_mode)
    _require_choice("loop_mode", mode, LOOP_MODES)
    _require_choice("cache_policy", cache_policy, (None, *CACHE_POLICIES))
    _require_choice("halt_dependency", halt_dependency, (None, *HALT_DEPENDENCIES))
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
    if mode != "fixed":
        return _adaptive_options(
            config, mode, low, high, num_loops, scheduler, quality_tier, halt_dependency, cache_policy,
            default_scheduler, default_dependency, overthinking_threshold,
        )  # fmt: skip
    for name, value in (
        ("scheduler", scheduler),
        ("halt_dependency", halt_dependency),
        ("quality_tier", quality_tier),
    ):
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "name", value)
        is_fixed = name == "scheduler" and kind == "fixed"
        if value is not None and not is_fixed:
            raise InvalidConfigError(
                f"{name}={value!r}: loop_mode='fixed' does not take it; use adaptive_sequence or adaptive_token",
                path=name,
                value=value,
            )
    if num_loops is None and isinstance(scheduler, (LoopScheduler, dict)):
        num_loops = getattr(build_scheduler(scheduler), "num_loops", None)
    row_loops = None
    if isinstance(num_loops, Tensor) and num_loops.ndim == 1:
        row_loops, counts = num_loops, _row_counts(num_loops)
    elif num_loops is not None:
        counts = [loop_count("num_loops", num_loops)]
    else:  # the configuration's default, moved inside bounds that the call has narrowed
        counts = [min(max(config.default_loops, low), high)]
    for loops in (min(counts), max(counts)):
        if loops < low or (loops > high and not (allow_extrapolation and max_loops is None)):
            hint = "" if loops < low or max_loops is not None else "; pass allow_extrapolation=True to go beyond it"
            raise InvalidConfigError(
                f"num_loops={loops}: must lie between min_loops={low} and max_loops={high}{hint}",
                path="num_loops",
                value=loops,
            )
    loops, cap = max(counts), config.loop_cap
    return LoopOptions(
        loop_mode=mode,
        num_loops=loops if cap is None else min(loops, cap),
        requested_loops=loops,
        min_loops=low,
        max_loops=max(high, loops),
        extrapolated=loops > config.trained_max_loops,
        row_loops=row_loops,
        cache_policy=cache_policy or "depth_indexed",
        trained_max_loops=config.trained_max_loops,
    )


def _adaptive_options(
    config: Any,
    mode: str,
    low: int,
    high: int,
    num_loops: Any,
    scheduler: Any,
    quality_tier: str | None,
    halt_dependency: str | None,
    cache_policy: str | None,
    default_scheduler: dict[str, Any] | None,
    default_dependency: str | None,
    overthinking_threshold: int | None,
) -> LoopOptions:
    if num_loops is not None:
        raise InvalidConfigError(
            f"num_loops={num_loops!r}: loop_mode={mode!r} chooses the number itself; bound it by min_loops and "
            "max_loops",
            path="num_loops",
            value=num_loops,
        )
    if mode == "adaptive_sequence" and halt_dependency not in (None, "row"):
        raise InvalidConfigError(
            f"halt_dependency={halt_dependency!r}: with loop_mode='adaptive_sequence' a row stops as a whole",
            path="halt_dependency",
            value=halt_dependency,
        )
    requested = high
    if overthinking_threshold is not None:
        high = max(low, min(high, overthinking_threshold))
    stored = default_scheduler if default_scheduler and default_scheduler.get("type") != "fixed" else None
    if stored is not None and (scheduler is None or (isinstance(scheduler, str) and scheduler == stored["type"])):
        built, halt_dependency = build_scheduler(stored), halt_dependency or default_dependency
    else:
        built = build_scheduler("rule_based" if scheduler is None else scheduler)
    if quality_tier is not None:
        low, high, thresholds = tier_settings(quality_tier, low, high)
        built = _with_thresholds(built, scheduler, thresholds)
    return LoopOptions(
        loop_mode=mode,
        num_loops=high if config.loop_cap is None else min(high, config.loop_cap),
        requested_loops=requested,
        min_loops=low,
        max_loops=high,
        extrapolated=high > config.trained_max_loops,
        scheduler=built,
        quality_tier=quality_tier,
        halt_dependency="row" if mode == "adaptive_sequence" else halt_dependency,
        cache_policy=cache_policy or "depth_indexed",
        trained_max_loops=config.trained_max_loops,
    )


def calibrated_dependency(scheduler_record: dict[str, Any]) -> str | None:
    """The dependency for which the thresholds in a ``scheduler.json`` were chosen; None where it names none."""
    found = ((scheduler_record.get("value_head") or {}).get("calibrated") or {}).get("halt_dependency")
    return found if found in HALT_DEPENDENCIES else None


def _with_thresholds(built: LoopScheduler, given: Any, thresholds: dict[str, Any]) -> LoopScheduler:
    """``built`` with the thresholds of a tier, for the fields that it uses and that ``given`` does not name.

    What stands in ``scheduler.json`` gives way. A probability is no gain, so its threshold stays.
    """
    if isinstance(given, LoopScheduler):
        return built
    named = given if isinstance(given, dict) else {}
    fields = built.to_dict()
    taken = {k: v for k, v in thresholds.items() if fields.get(k) is not None and not _names(named, k)}
    if fields.get("output_kind") == "continue_logit":
        taken.pop("gain_threshold", None)
    if "gain_threshold" in taken and fields.get("loop_thresholds") and "loop_thresholds" not in named:
        taken["loop_thresholds"] = None
    return build_scheduler(fields | taken)


def _names(fields: dict[str, Any], name: str) -> bool:
    return name in fields or any(own == name and alias in fields for alias, own in FIELD_ALIASES.items())


def _row_counts(num_loops: Tensor) -> list[int]:
    if not _is_integer(num_loops) or not num_loops.numel():
        raise InvalidConfigError(
            f"num_loops: a tensor must hold integers, one or one for each row, got {num_loops.dtype} "
            f"{tuple(num_loops.shape)}",
            path="num_loops",
        )
    low, high = (loop_count("num_loops", x) for x in num_loops.aminmax())
    return [low, high]


def _require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise InvalidConfigError(
            f"{name}={value!r}: must be one of {', '.join(str(c) for c in choices if c is not None)}",
            path=name,
            value=value,
        )


def loop_bound(config: Any, settings: dict[str, Any], max_loops_per_token: int) -> int:
    """The ``max_loops`` of a request with this budget, which lowers the bound and never raises it.

    A fixed number beyond the configuration's maximum, which ``allow_extrapolation`` permits, is bound by the budget
    alone.
    """
    given = settings.get("max_loops")
    if given is not None:
        most = loop_count("max_loops", given)
    else:
        is_fixed = settings.get("loop_mode") in (None, "fixed")
        most = HARD_MAX_LOOPS if is_fixed and settings.get("allow_extrapolation") else config.max_loops
    return min(most, max_loops_per_token)


def budget_limits(settings: dict[str, Any]) -> BudgetLimits:
    """The limits among the keywords of a request."""
    return BudgetLimits(**{name: settings.get(name) for name in BUDGET_KEYWORDS})


def refuse_misspelt(names: Any, known: Any = LOOP_KEYWORDS) -> None:
    """Raise for a keyword that is almost one of ours; model forwards would swallow it without a word.

    Raises:
        InvalidConfigError: a name holds "loop", or is close to a loop keyword, without being one.
    """
    for name in names:
        near = nearest_name(name, known, cutoff=0.8)
        if name not in known and ("loop" in name or near):
            raise InvalidConfigError(f"unknown argument {name!r}{near or nearest_name(name, known, 0.3)}", path=name)
