"""Checks of the numbers that make up a scheduler; bool counts as no number."""

import math
import operator
from numbers import Real
from typing import Any

from cognexis.configuration_rules import nearest_name
from cognexis.errors import ConfigFault, InvalidConfigError


def field_error(name: str, value: Any, reason: str) -> InvalidConfigError:
    """The error of one field: "name=value: reason"."""
    fault = ConfigFault(name, value, reason)
    return InvalidConfigError(str(fault), faults=[fault])


def whole_number(name: str, value: Any, at_least: int) -> int:
    """Return ``value`` as an int.

    Raises:
        InvalidConfigError: no integer, or below ``at_least``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < at_least:
        raise field_error(name, value, f"must be an integer of at least {at_least}")
    return number


def real_number(name: str, value: Any, *, at_most: float = math.inf, is_positive: bool = False) -> float:
    """Return ``value`` as a finite float of at least 0.

    Raises:
        InvalidConfigError: no number, not finite, negative, above ``at_most``, or 0 where it must be positive.
    """
    allowed = "finite and above 0" if is_positive else "finite and at least 0"
    allowed = f"a number in [0, {at_most:g}]" if at_most < math.inf else f"a number, {allowed}"
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not (math.isfinite(number) and 0 <= number <= at_most and (number > 0 or not is_positive)):
        raise field_error(name, value, f"must be {allowed}")
    return number


def optional_number(name: str, value: Any, *, at_most: float = math.inf) -> float | None:
    """As :func:`real_number`; None stays None."""
    return None if value is None else real_number(name, value, at_most=at_most)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        InvalidConfigError: it is not; the message names the nearest choice.
    """
    if not (isinstance(value, str) and value in choices):
        near = nearest_name(value, choices) if isinstance(value, str) else ""
        raise field_error(name, value, f"must be one of {', '.join(choices)}{near}")
    return value
