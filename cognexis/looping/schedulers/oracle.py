"""The best possible halting, from losses that only an evaluation knows.

A slot halts at the first loop i from which no later loop improves the loss by more than ``tolerance``:

    loss_i - min(loss_{i+1}, ..., loss_{max_loops}) <= tolerance

Loops without a recorded loss count as no improvement. A NaN loss never halts before the last loop.

Source: contract SCH-09.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.base import (
    LoopDecision,
    LoopObservation,
    LoopScheduler,
    SchedulerContext,
    reason_code,
)
from cognexis.looping.schedulers.fields import field_error, real_number
from cognexis.looping.schedulers.guard import apply_bounds

_NO_GAIN = reason_code("value_gain")


@dataclass(eq=False)
class OracleScheduler(LoopScheduler):
    """Knows the losses of every loop; for analysis only.

    Attributes:
        losses: ``[L, slots]``, row i - 1 after loop i; a nested list is taken as float64.
        tolerance: improvement that is not worth a loop, finite and at least 0.

    Raises:
        InvalidConfigError: no table of floating-point losses, or a tolerance outside its range.
    """

    name = "oracle"
    losses: Tensor = field(repr=False)
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        self.tolerance = real_number("tolerance", self.tolerance)
        try:
            losses = self.losses if isinstance(self.losses, Tensor) else torch.tensor(self.losses, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise field_error("losses", self.losses, "must be a table of numbers [L, slots]") from error
        if not (losses.ndim and len(losses) and losses.dtype.is_floating_point):
            given = f"{losses.dtype} {list(losses.shape)}"
            raise field_error("losses", given, "must be floating-point numbers [L, slots] of at least one loop")
        self.losses = losses
        self._slots: Tensor | None = None  # the losses of the running request

    def begin_request(self, context: SchedulerContext) -> None:
        """Start a request.

        Raises:
            InvalidConfigError: the request is no analysis.
        """
        super().begin_request(context)
        self._slots = self.losses if context.is_analysis else None
        self._permitted()

    def observe(self, observation: LoopObservation) -> LoopDecision:
        losses = self._permitted()
        losses = losses.to(observation.device or losses.device)
        loops = min(observation.loops, len(losses))
        later = losses[loops : observation.max_loops]
        if loops == 0:
            halt = torch.zeros_like(losses[0], dtype=torch.bool)
        elif len(later) == 0:
            halt = torch.ones_like(losses[0], dtype=torch.bool)
        else:
            halt = losses[loops - 1] - later.amin(0) <= self.tolerance
        reasons = torch.full_like(halt, _NO_GAIN, dtype=torch.int8)
        return self.record(observation, apply_bounds(observation, LoopDecision(halt, reasons)))

    def finish(self) -> dict[str, Any]:
        self._slots = None
        return super().finish()

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if self._slots is not None and self._slots.ndim > 1:
            self._slots = self._slots[:, rows]

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"losses": self.losses.tolist()}

    def _permitted(self) -> Tensor:
        if self._slots is None:
            message = "scheduler 'oracle' sees true losses: it needs a request with is_analysis=True"
            raise InvalidConfigError(message, path="scheduler", value="oracle")
        return self._slots
