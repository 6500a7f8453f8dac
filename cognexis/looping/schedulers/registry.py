"""Schedulers by name, and the presets of the quality tiers.

A user's scheduler is registered once and then chosen like a built-in one:

    register_scheduler("every_other", EveryOther)
    build_scheduler({"type": "every_other", "parity": 1})

Source: contract SCH-09, SCH-15, SCH-17.
"""

import inspect
from typing import Any

from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.act import ActScheduler
from cognexis.looping.schedulers.base import QUALITY_TIERS, LoopScheduler
from cognexis.looping.schedulers.fields import field_error, one_of, whole_number
from cognexis.looping.schedulers.fixed import FixedScheduler
from cognexis.looping.schedulers.hybrid import HybridScheduler
from cognexis.looping.schedulers.oracle import OracleScheduler
from cognexis.looping.schedulers.rule_based import RuleBasedScheduler
from cognexis.looping.schedulers.value_head import ValueHeadScheduler

_BUILT_IN: dict[str, type[LoopScheduler]] = {
    "fixed": FixedScheduler,
    "rule_based": RuleBasedScheduler,
    "value_head": ValueHeadScheduler,
    "hybrid": HybridScheduler,
    "act": ActScheduler,
    "oracle": OracleScheduler,
}
FIELD_ALIASES = {"predicted_gain_threshold": "gain_threshold"}
"""Names of fields in run configurations -> those of the schedulers, which know both."""
_REGISTERED: dict[str, type[LoopScheduler]] = {}

# Tier -> thresholds; balanced has the defaults of the schedulers.
_TIER_THRESHOLDS = {
    "fast": {"min_delta": 0.1, "confidence_threshold": 0.9, "gain_threshold": 2e-3},
    "balanced": {"min_delta": 0.03, "confidence_threshold": 0.95, "gain_threshold": 5e-4},
    "thorough": {"min_delta": 0.01, "confidence_threshold": 0.99, "gain_threshold": 1e-4},
}


def scheduler_names() -> tuple[str, ...]:
    """All names that :func:`build_scheduler` knows, built-in ones first."""
    return (*_BUILT_IN, *_REGISTERED)


def register_scheduler(name: str, cls: type[LoopScheduler]) -> None:
    """Make ``cls`` available under ``name``; a class without a name of its own gets this one.

    Args:
        name: what ``scheduler=`` and the "type" of a dictionary say.
        cls: a ``LoopScheduler`` whose constructor takes its fields as keywords.

    Raises:
        InvalidConfigError: no such class, another name than the class has, the name of a built-in scheduler, or one
            that belongs to another class. The same class may be defined and registered again.
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise field_error("scheduler", name, "must be a name of letters, digits and underscores")
    if not (isinstance(cls, type) and issubclass(cls, LoopScheduler)) or inspect.isabstract(cls):
        raise field_error("scheduler", cls, "must be a subclass of LoopScheduler that implements observe()")
    if name in _BUILT_IN:
        raise field_error("scheduler", name, "is the name of a built-in scheduler")
    known = _REGISTERED.get(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise field_error("scheduler", name, f"is registered for {known.__qualname__} already")
    if getattr(cls, "name", name) != name:
        raise field_error("scheduler", name, f"must equal {cls.__qualname__}.name, {cls.name!r}")
    cls.name = name
    _REGISTERED[name] = cls


def build_scheduler(spec: str | dict[str, Any] | LoopScheduler, *, allow_analysis: bool = False) -> LoopScheduler:
    """Make the scheduler that ``spec`` describes.

    Args:
        spec: a name, a dictionary with "type" and the fields that differ from the defaults, or a scheduler, which is
            returned as it is. Fields may have their names in run configurations, see ``FIELD_ALIASES``.
        allow_analysis: permit the oracle.

    Raises:
        InvalidConfigError: an unknown type or field (the message names the nearest), a field that is missing, out of
            range or given under both of its names, or the oracle outside an analysis.
    """
    if isinstance(spec, LoopScheduler):
        _check_oracle(isinstance(spec, OracleScheduler), allow_analysis)
        return spec
    if isinstance(spec, str):
        spec = {"type": spec}
    if not isinstance(spec, dict):
        raise field_error("scheduler", spec, "must be a name, a dictionary or a LoopScheduler")
    if "type" not in spec:
        raise field_error("scheduler", spec, f'needs a "type", one of {", ".join(scheduler_names())}')
    name = one_of("scheduler.type", spec["type"], scheduler_names())
    cls = (_BUILT_IN | _REGISTERED)[name]
    _check_oracle(cls is OracleScheduler, allow_analysis)
    fields = _own_names({key: value for key, value in spec.items() if key != "type"}, cls)
    _check_names(name, fields, cls)
    return cls(**fields)


def tier_settings(tier: str, min_loops: int, max_loops: int) -> tuple[int, int, dict[str, float]]:
    """The bounds and thresholds of a quality tier.

    With M the middle of the bounds, rounded up: fast runs min_loops to M loops, thorough M to max_loops, balanced
    uses both bounds as they are.

    Args:
        tier: one of ``QUALITY_TIERS``.
        min_loops: lower bound of the request.
        max_loops: upper bound of the request.

    Returns:
        Lower and upper bound, never outside the given ones, and ``min_delta``, ``confidence_threshold`` and
        ``gain_threshold``, for those fields that a scheduler has and uses.

    Raises:
        InvalidConfigError: an unknown tier, or bounds that contradict each other.
    """
    one_of("quality_tier", tier, QUALITY_TIERS)
    whole_number("min_loops", min_loops, at_least=1)
    whole_number("max_loops", max_loops, at_least=min_loops)
    middle = (min_loops + max_loops + 1) // 2
    low, high = {"fast": (min_loops, middle), "thorough": (middle, max_loops)}.get(tier, (min_loops, max_loops))
    return low, high, dict(_TIER_THRESHOLDS[tier])


def _check_oracle(is_oracle: bool, allow_analysis: bool) -> None:
    if is_oracle and not allow_analysis:
        raise field_error("scheduler", "oracle", "sees true losses and is for analysis only")


def _own_names(fields: dict[str, Any], cls: type[LoopScheduler]) -> dict[str, Any]:
    """``fields`` with the names that the constructor of ``cls`` knows."""
    known = inspect.signature(cls).parameters
    renamed = {alias: own for alias, own in FIELD_ALIASES.items() if alias in fields and own in known}
    for alias, own in renamed.items():
        if own in fields:
            raise field_error(f"scheduler.{alias}", fields[alias], f"is {own}, which is given too")
    return {renamed.get(key, key): value for key, value in fields.items()}


def _check_names(name: str, fields: dict[str, Any], cls: type[LoopScheduler]) -> None:
    """Refuse fields that the constructor does not take, and missing ones that it needs."""
    parameters = inspect.signature(cls).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    is_open = len(known) < len(parameters)
    for key in fields:
        if not is_open and key not in known:
            near = nearest_name(str(key), known) or f"; known: {', '.join(known) or 'none'}"
            raise InvalidConfigError(f"scheduler.{key}: {name} has no such field{near}", path=f"scheduler.{key}")
    for parameter in parameters:
        is_needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if is_needed and parameter.name not in fields:
            path = f"scheduler.{parameter.name}"
            raise InvalidConfigError(f"{path}: {name} needs this field", path=path)
