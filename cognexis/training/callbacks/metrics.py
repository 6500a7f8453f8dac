"""Measurements between two log lines.

Values are added whenever they are measured and stay on their device; ``drain`` gives the mean of each name (for alerts
the number of them) and starts anew, so that the device is waited for once per log line.
"""

import logging
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("cognexis.training")


class MetricBuffer:
    """Named measurements of a run."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, name: str, value: Tensor | float) -> None:
        """Note one measurement of ``name``; a tensor must have no axes."""
        self._values.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float32).detach())

    def add_all(self, prefix: str, values: dict[str, Any]) -> None:
        """Note several measurements under ``prefix/name``."""
        for name, value in values.items():
            self.add(f"{prefix}/{name}", value)

    def count(self, name: str, number: int = 1) -> None:
        """Count ``number`` events of ``name``."""
        self._counts[name] += number

    def alert(self, name: str, message: str) -> None:
        """Count an alert as ``alerts/name`` and say it in the log."""
        self.count(f"alerts/{name}")
        logger.warning("%s: %s", name, message)

    def state_dict(self) -> dict[str, Any]:
        """What was measured since the last log line, as JSON data; NaN and infinity are text."""
        values = {name: [_as_json(v.item()) for v in found] for name, found in self._values.items()}
        return {"values": values, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._values = {
            name: [torch.tensor(float(value), dtype=torch.float32) for value in found]
            for name, found in state["values"].items()
        }
        self._counts = Counter({name: int(count) for name, count in state["counts"].items()})

    def drain(self) -> dict[str, float]:
        """Means and numbers since the last call."""
        found = {name: torch.stack([v.cpu() for v in values]).mean().item() for name, values in self._values.items()}
        found |= {name: float(number) for name, number in self._counts.items()}
        self._values.clear()
        self._counts.clear()
        return found


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
