"""Monotone maps from what the value head says to what was measured; stored in ``scheduler.json``.

    temperature   y = x / temperature
    linear        y = scale * x + offset
    isotonic      piecewise linear through (x_k, y_k), constant outside [x_1, x_n]
    by_loop       the n-th of ``maps`` for loop n, the last one for deeper loops

A map never reverses the order of two predictions, so it moves thresholds and keeps rankings. It holds plain numbers
and no parameters: it belongs to the scheduler and not to the weights.
"""

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError

MAX_POINTS = 4096


class ValueCalibration(ABC):
    """One map.

    Args:
        settings: ``{"method": ..., ...}`` with exactly the keys of its method.
        name: what messages call it.

    Raises:
        InvalidConfigError: a number of the wrong kind, or a map that is not monotone.
    """

    keys: ClassVar[tuple[str, ...]]

    def __init__(self, settings: dict[str, Any], name: str) -> None:
        self.settings = settings
        self.name = name

    @abstractmethod
    def __call__(self, values: Tensor, loop_index: int) -> Tensor:
        """Map ``values`` of any shape, predicted after ``loop_index`` loops (from 1)."""

    def number(self, key: str, positive: bool = False) -> float:
        """The setting ``key``, a finite number."""
        value = self.settings[key]
        if not _is_number(value) or (positive and value <= 0):
            raise _fault(f"{self.name}.{key}", value, f"must be finite{' and positive' if positive else ''}")
        return float(value)


class TemperatureCalibration(ValueCalibration):
    """Divides by a positive number."""

    keys = ("temperature",)

    def __init__(self, settings: dict[str, Any], name: str) -> None:
        super().__init__(settings, name)
        self.temperature = self.number("temperature", positive=True)

    def __call__(self, values: Tensor, loop_index: int) -> Tensor:
        return values / self.temperature


class LinearCalibration(ValueCalibration):
    """A rising straight line."""

    keys = ("scale", "offset")

    def __init__(self, settings: dict[str, Any], name: str) -> None:
        super().__init__(settings, name)
        self.scale, self.offset = self.number("scale", positive=True), self.number("offset")

    def __call__(self, values: Tensor, loop_index: int) -> Tensor:
        return values * self.scale + self.offset


class IsotonicCalibration(ValueCalibration):
    """Straight pieces through points that rise strictly in x and never fall in y."""

    keys = ("x", "y")

    def __init__(self, settings: dict[str, Any], name: str) -> None:
        super().__init__(settings, name)
        for key in self.keys:
            values = settings[key]
            if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= MAX_POINTS:
                raise _fault(f"{name}.{key}", values, f"must be a list of 1 to {MAX_POINTS} numbers")
            if not all(map(_is_number, values)):
                raise _fault(f"{name}.{key}", values, "must hold finite numbers")
        x, y = settings["x"], settings["y"]
        if len(x) != len(y):
            raise _fault(f"{name}.y", y, f"must have as many entries as x, {len(x)}, not {len(y)}")
        if any(later <= earlier for earlier, later in pairwise(x)):
            raise _fault(f"{name}.x", x, "must rise strictly")
        if any(later < earlier for earlier, later in pairwise(y)):
            raise _fault(f"{name}.y", y, "must never fall")
        self._points: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, values: Tensor, loop_index: int) -> Tensor:
        if values.device not in self._points:  # copied to a device once, not once per loop
            x, y = (torch.tensor(self.settings[key], dtype=torch.float32, device=values.device) for key in self.keys)
            self._points[values.device] = (x, y)
        x, y = (points.to(values.dtype) for points in self._points[values.device])
        if len(x) == 1:
            return torch.where(values.isnan(), values, y)
        inside = values.clamp(x[0], x[-1])
        upper = torch.searchsorted(x, inside.contiguous()).clamp(1, len(x) - 1)
        width = x[upper] - x[upper - 1]
        share = torch.where(width > 0, (inside - x[upper - 1]) / width, 0)  # points may meet in a narrower dtype
        return torch.lerp(y[upper - 1], y[upper], share)


class LoopwiseCalibration(ValueCalibration):
    """A map of its own for each loop."""

    keys = ("maps",)

    def __init__(self, settings: dict[str, Any], name: str) -> None:
        super().__init__(settings, name)
        maps = settings["maps"]
        if not isinstance(maps, (list, tuple)) or not maps:
            raise _fault(f"{name}.maps", maps, "must be a list with one map or more")
        self.maps = [build_calibration(entry, f"{name}.maps[{index}]") for index, entry in enumerate(maps)]

    def __call__(self, values: Tensor, loop_index: int) -> Tensor:
        return self.maps[min(loop_index, len(self.maps)) - 1](values, loop_index)


CALIBRATIONS: dict[str, type[ValueCalibration]] = {
    "temperature": TemperatureCalibration,
    "linear": LinearCalibration,
    "isotonic": IsotonicCalibration,
    "by_loop": LoopwiseCalibration,
}


def build_calibration(settings: Any, name: str = "calibration") -> ValueCalibration:
    """The map that ``settings`` describe.

    Raises:
        InvalidConfigError: an unknown method or key, a number that is not finite, or a map that is not monotone.
    """
    if not isinstance(settings, dict):
        raise _fault(name, settings, "must be an object with a method")
    method = settings.get("method")
    if not isinstance(method, str) or method not in CALIBRATIONS:
        near = nearest_name(method, CALIBRATIONS) if isinstance(method, str) else ""
        raise _fault(f"{name}.method", method, f"must be one of {', '.join(CALIBRATIONS)}{near}")
    kind = CALIBRATIONS[method]
    if missing := [key for key in kind.keys if key not in settings]:
        raise InvalidConfigError(f"{name}.{missing[0]}: method {method!r} needs it", path=f"{name}.{missing[0]}")
    if unknown := [key for key in settings if key not in ("method", *kind.keys)]:
        near = nearest_name(str(unknown[0]), kind.keys)
        raise InvalidConfigError(f"{name}.{unknown[0]}: unknown key{near}", path=f"{name}.{unknown[0]}")
    return kind(settings, name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fault(path: str, value: Any, reason: str) -> InvalidConfigError:
    shown = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:197]}..."
    return InvalidConfigError(f"{path}={shown}: {reason}", path=path, value=value, reason=reason)
