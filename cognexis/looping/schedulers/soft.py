"""What all schedulers have in common that halt by a rule over signals.

A rule is a comparison, or several joined by "and". Three options make rules steadier, each per slot:

    hysteresis h   A comparison that held in the loop before keeps holding until its signal passes a looser threshold:
                   threshold * (1 + h) for "below", threshold / (1 + h) for "above".
    patience q     A rule asks for halting once it has held q loops running.
    delay d        The decision of loop i, with its reason, is acted on at loop i + d, whatever loop i + d says.

Loops below ``min_loops`` count for all three; only the halting waits. Every new pass starts without memory.
Comparisons are made in at least float32, and with NaN they are False: a NaN signal never halts.

Of several rules that hold, the first in the scheduler's order gives the reason.

Source: contract D-08 (strict comparisons), TOKW-05 (order delta, gain, confidence).
"""

import abc
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.base import (
    NO_REASON,
    LoopDecision,
    LoopObservation,
    LoopScheduler,
    SchedulerContext,
)
from cognexis.looping.schedulers.fields import real_number, whole_number
from cognexis.looping.schedulers.guard import apply_bounds
from cognexis.looping.schedulers.trace import require_same_slots

DELTA_KINDS = ("relative", "absolute")
Rules = list[tuple[Tensor, int]]  # for each rule, in order: where it holds [slots], and the code of its reason


@dataclass(eq=False, kw_only=True)
class SoftScheduler(LoopScheduler):
    """A scheduler made of rules.

    Attributes:
        patience: loops running that a rule must hold, at least 1.
        delay: loops between a decision and its effect, at least 0.
        hysteresis: share by which a threshold loosens while its comparison holds, finite and at least 0.

    Raises:
        InvalidConfigError: a field outside its range.
    """

    patience: int = 1
    delay: int = 0
    hysteresis: float = 0.0

    def __post_init__(self) -> None:
        self.patience = whole_number("patience", self.patience, at_least=1)
        self.delay = whole_number("delay", self.delay, at_least=0)
        self.hysteresis = real_number("hysteresis", self.hysteresis)
        self._held: dict[str, Tensor] = {}  # comparisons of the loop before
        self._runs: dict[int, Tensor] = {}  # loops running that each rule has held
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()  # delayed decisions, the oldest first

    @abc.abstractmethod
    def rules(self, observation: LoopObservation, diagnostics: dict[str, Any]) -> Rules:
        """Evaluate all rules; may put small values into ``diagnostics`` of the decision."""

    def begin_request(self, context: SchedulerContext) -> None:
        super().begin_request(context)
        self._forget()

    def observe(self, observation: LoopObservation) -> LoopDecision:
        if self.trace.starts_pass(observation.loops):
            self._forget()
        diagnostics: dict[str, Any] = {}
        halt = torch.zeros(observation.shape, dtype=torch.bool, device=observation.device)
        reasons = torch.full_like(halt, NO_REASON, dtype=torch.int8)
        for place, (holds, code) in enumerate(self.rules(observation, diagnostics)):
            asks = self._held_long_enough(place, holds)
            reasons = torch.where(asks & ~halt, code, reasons)
            halt = halt | asks
        halt, reasons = self._delayed(halt, reasons)
        return self.record(observation, apply_bounds(observation, LoopDecision(halt, reasons, diagnostics)))

    def finish(self) -> dict[str, Any]:
        self._forget()
        return super().finish()

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._held = {name: _rows_of(held, rows) for name, held in self._held.items()}
        self._runs = {place: _rows_of(run, rows) for place, run in self._runs.items()}
        self._waiting = deque((_rows_of(halt, rows), _rows_of(reasons, rows)) for halt, reasons in self._waiting)

    def needed(self, observation: LoopObservation, name: str) -> Tensor:
        """The field ``name`` of the observation in at least float32, in the shape of the slots.

        Raises:
            InvalidConfigError: the observation does not have it.
        """
        signal = getattr(observation, name)
        if signal is None:
            message = f"scheduler {self.name!r} needs {name}, which the observation does not have"
            raise InvalidConfigError(message, path=f"observation.{name}")
        return signal.to(torch.promote_types(signal.dtype, torch.float32)).expand(observation.shape)

    def below(self, name: str, signal: Tensor, threshold: float) -> Tensor:
        """Where ``signal`` < ``threshold``; ``name`` identifies the comparison."""
        return self.keeps(name, signal < threshold, signal < threshold * (1 + self.hysteresis))

    def above(self, name: str, signal: Tensor, threshold: float) -> Tensor:
        """Where ``signal`` > ``threshold``; ``name`` identifies the comparison."""
        return self.keeps(name, signal > threshold, signal > threshold / (1 + self.hysteresis))

    def keeps(self, name: str, holds: Tensor, nearly: Tensor) -> Tensor:
        """Where a comparison holds, or held in the loop before and still holds with the looser threshold."""
        if self.hysteresis:
            if (before := self._held.get(name)) is not None:
                require_same_slots(before, holds)
                holds = holds | (before & nearly)
            self._held[name] = holds
        return holds

    def _held_long_enough(self, place: int, holds: Tensor) -> Tensor:
        if self.patience == 1:
            return holds
        run = holds.to(torch.int32)
        if (before := self._runs.get(place)) is not None:
            require_same_slots(before, run)
            run = run * (before + 1)
        self._runs[place] = run
        return run >= self.patience

    def _delayed(self, halt: Tensor, reasons: Tensor) -> tuple[Tensor, Tensor]:
        if not self.delay:
            return halt, reasons
        self._waiting.append((halt, reasons))
        if len(self._waiting) <= self.delay:
            return torch.zeros_like(halt), torch.zeros_like(reasons)
        require_same_slots(self._waiting[0][0], halt)
        return self._waiting.popleft()

    def _forget(self) -> None:
        self._held, self._runs, self._waiting = {}, {}, deque()


def _rows_of(values: Tensor, rows: Tensor) -> Tensor:
    return values[rows] if values.ndim else values
