"""The record of one request: loops, budget, reasons, and means of the signals by loop.

State stays small whatever the length of a text: per signal one sum for each loop, one count for each reason, and one
reason for each slot of the running pass. It lives on the device until :meth:`RequestTrace.summary` reads it.

A slot counts with the reason of its first halting answer in a pass; the driver may halt it later than asked, when a
token waits for others. Where the driver tells which slots are active, only these count.

Source: contract SCH-11.
"""

import math
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import ShapeMismatchError


class RequestTrace:
    """What a scheduler has seen and answered since the request began.

    Args:
        reason_names: halt reasons; the code of one is its place, from 1.
    """

    def __init__(self, reason_names: tuple[str, ...]) -> None:
        self._reason_names = reason_names
        self._loops_before = 0  # of the passes that are over
        self._last_loops: int | None = None
        self._first_reasons: Tensor | None = None  # [slots] of the running pass
        self._counts: Tensor | int = 0  # [reasons] of everything that is over
        self._sums: dict[str, dict[int, tuple[Tensor | float, Tensor | int]]] = {}  # sum and number of slots by loop

    def starts_pass(self, loops: int) -> bool:
        """Say whether an observation after ``loops`` loops is the first of a pass."""
        return self._last_loops is None or loops <= self._last_loops

    def note_loops(self, loops: int) -> None:
        """Note no more than that a decision was made after ``loops`` loops."""
        if self.starts_pass(loops):
            self._end_pass()
        self._last_loops = loops

    def add(
        self,
        loops: int,
        halt: Tensor,
        reasons: Tensor,
        signals: dict[str, Tensor | None],
        is_active: Tensor | None = None,
    ) -> None:
        """Note one decision, ``halt`` and ``reasons`` [slots], and the signals it was made of.

        Slots that are not ``is_active`` do not count.

        Raises:
            ShapeMismatchError: other slots than before in the same pass.
        """
        if self.starts_pass(loops):
            self._end_pass()
        if self._first_reasons is None:
            self._first_reasons = torch.zeros_like(reasons)
        require_same_slots(self._first_reasons, reasons)
        active = torch.ones_like(halt) if is_active is None else is_active
        is_new = halt & active & (self._first_reasons == 0)
        self._first_reasons = torch.where(is_new, reasons, self._first_reasons)
        self._last_loops = loops
        for name, value in signals.items():
            if value is not None:
                total, count = self._sums.setdefault(name, {}).get(loops, (0.0, 0))
                values, runs = torch.broadcast_tensors(value.detach().to(torch.float32), active)
                self._sums[name][loops] = (total + torch.where(runs, values, 0.0).sum(), count + runs.sum())

    def select(self, rows: Tensor) -> None:
        """Count the slots outside ``rows`` as over."""
        if self._first_reasons is not None and self._first_reasons.ndim:
            kept = self._first_reasons[rows]
            self._counts = self._counts + self._count(self._first_reasons) - self._count(kept)
            self._first_reasons = kept

    def summary(self) -> dict[str, Any]:
        """Read the record from the device.

        Returns:
            ``loops``: loops of the last pass; ``budget_used``: loops of all passes together; ``reasons``: number of
            slots by halt reason; ``means``: for each signal its mean after every loop, from the first observed loop
            on, None where it is not finite.
        """
        loops = self._last_loops or 0
        self._end_pass()
        counts = self._counts.tolist() if isinstance(self._counts, Tensor) else []
        means = {
            name: [_mean(float(total), int(count)) for _, (total, count) in sorted(by_loop.items())]
            for name, by_loop in self._sums.items()
        }
        return {
            "loops": loops,
            "budget_used": self._loops_before,
            "reasons": {name: n for name, n in zip(self._reason_names, counts, strict=False) if n},
            "means": means,
        }

    def _end_pass(self) -> None:
        self._loops_before += self._last_loops or 0
        if self._first_reasons is not None:
            self._counts = self._counts + self._count(self._first_reasons)
        self._last_loops = self._first_reasons = None

    def _count(self, reasons: Tensor) -> Tensor:
        codes = torch.arange(1, len(self._reason_names) + 1, device=reasons.device)
        return (reasons.reshape(-1, 1) == codes).sum(0)


def require_same_slots(before: Tensor, now: Tensor) -> None:
    """Refuse state of other slots than those of the observation.

    Raises:
        ShapeMismatchError: the shapes differ.
    """
    if before.shape != now.shape:
        expected, actual = tuple(before.shape), tuple(now.shape)
        message = f"slots changed from {expected} to {actual} within a pass; call select(rows) when rows leave"
        raise ShapeMismatchError(message, expected=expected, actual=actual)


def _mean(total: float, count: int) -> float | None:
    return total / count if count and math.isfinite(total) else None
