"""The interface between the loop driver and whatever decides who runs another loop.

After loop i of a pass the driver shows one :class:`LoopObservation` to the scheduler and gets one
:class:`LoopDecision` back. A slot is what halts by itself: a row (``[B]``) or a token (``[B, T]``); below, [slots]
stands for either. Everything is elementwise over slots and stays on the device: a decision never waits for the host,
and what depends on values is chosen by ``torch.where``. Observations hold no labels and no losses.

A request may consist of several passes (chunks of a prompt, then new tokens). A pass begins with an observation whose
``loops`` is not above that of the one before.

Letters: B batch, T time (tokens).
Source: contract SCH-01 to SCH-03, SCH-11.
"""

import abc
import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from cognexis.errors import ShapeMismatchError
from cognexis.looping.schedulers.fields import field_error, one_of, whole_number
from cognexis.looping.schedulers.trace import RequestTrace

HALT_REASONS = (
    "min_loops_not_met",
    "max_loops",
    "min_delta",
    "confidence",
    "value_gain",
    "budget",
    "safety",
    "all_tokens_halted",
    "forced",
    "error",
)
NO_REASON = 0
QUALITY_TIERS = ("fast", "balanced", "thorough")


def reason_code(name: str) -> int:
    """The number of a halt reason in ``LoopDecision.reasons``, 1 to 10.

    Raises:
        InvalidConfigError: no such reason.
    """
    return HALT_REASONS.index(one_of("halt_reason", name, HALT_REASONS)) + 1


def reason_name(code: int) -> str | None:
    """The halt reason with this number; None for ``NO_REASON``.

    Raises:
        InvalidConfigError: no reason has this number.
    """
    if not 0 <= code <= len(HALT_REASONS):
        raise field_error("halt_reason", code, f"must be a code between 0 and {len(HALT_REASONS)}")
    return HALT_REASONS[code - 1] if code else None


@dataclass(frozen=True)
class SchedulerContext:
    """What a scheduler may know about a request before its first loop.

    Attributes:
        request_id: name of the request, not empty.
        min_loops: lower bound, at least 1.
        max_loops: upper bound; risk, tiers and a measured overthinking depth have lowered it already.
        loop_budget: loops that the request has left; None: no limit.
        deadline: monotonic time in seconds at which the request must end; None: no limit.
        quality_tier: one of ``QUALITY_TIERS``, or None.
        is_analysis: an evaluation with known losses, which alone may use the oracle.

    Raises:
        InvalidConfigError: a field outside these ranges.
    """

    request_id: str
    min_loops: int
    max_loops: int
    loop_budget: int | None = None
    deadline: float | None = None
    quality_tier: str | None = None
    is_analysis: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.request_id, str) and self.request_id.strip()):
            raise field_error("request_id", self.request_id, "must be a text that is not empty")
        whole_number("min_loops", self.min_loops, at_least=1)
        if whole_number("max_loops", self.max_loops, at_least=1) < self.min_loops:
            raise field_error("max_loops", self.max_loops, f"must be at least min_loops={self.min_loops}")
        if self.loop_budget is not None:
            whole_number("loop_budget", self.loop_budget, at_least=0)
        if self.quality_tier is not None:
            one_of("quality_tier", self.quality_tier, QUALITY_TIERS)


@dataclass(frozen=True, eq=False)
class LoopObservation:
    """What is known after a loop; None: not measured.

    Tensors have the shape of the slots, with size 1 where one value serves all, or no axes.

    Attributes:
        loops: loops executed so far in this pass, equal for all slots.
        min_loops: lower bound.
        max_loops: upper bound.
        hidden_delta: norm of the change of the state in the last loop.
        relative_delta: that, divided by the norm of the state before.
        state_norm: norm of the state.
        confidence: probability of the most likely token.
        margin: distance to the second most likely token, in probability.
        entropy: of the prediction, in nats.
        prediction_change: KL divergence from the prediction before this loop to the one after; infinite at loop 1.
        predicted_gain: the value head's estimate of what the next loop gains.
        continue_logit: the value head's logit that the next loop helps.
        uncertainty: the value head's estimate of its own risk.
        remaining_loops: loops that a slot may still run before its budget is used up.
        remaining_flops: floating-point operations that the request has left.
        remaining_ms: milliseconds that the request has left.
        is_risky: slots that a safety rule stops.
        is_active: slots that still run; the others are shown but do not count in means and records. None: all run.
        preference: quality tier of the request.
        shape: shape of the slots, that of all tensors broadcast together; ``()`` where none has axes.
        device: device of the slots; None where there is no tensor.

    Raises:
        InvalidConfigError: bounds that contradict each other, or a negative number of loops.
        ShapeMismatchError: tensors of different slots.
    """

    loops: int
    min_loops: int
    max_loops: int
    hidden_delta: Tensor | None = None
    relative_delta: Tensor | None = None
    state_norm: Tensor | None = None
    confidence: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None
    prediction_change: Tensor | None = None
    predicted_gain: Tensor | None = None
    continue_logit: Tensor | None = None
    uncertainty: Tensor | None = None
    remaining_loops: Tensor | int | None = None
    remaining_flops: float | None = None
    remaining_ms: float | None = None
    is_risky: Tensor | None = None
    is_active: Tensor | None = None
    preference: str | None = None
    shape: torch.Size = field(init=False)
    device: torch.device | None = field(init=False)

    def __post_init__(self) -> None:
        if self.loops < 0:
            raise field_error("loops", self.loops, "must be at least 0")
        if not 1 <= self.min_loops <= self.max_loops:
            reason = f"must be at least 1 and at most max_loops={self.max_loops}"
            raise field_error("min_loops", self.min_loops, reason)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        like = max(tensors.values(), key=lambda tensor: tensor.ndim, default=None)
        shape = [] if like is None else [max(sizes) for sizes in zip(*_shapes(tensors, like.ndim), strict=True)]
        object.__setattr__(self, "shape", torch.Size(shape))
        object.__setattr__(self, "device", None if like is None else like.device)
        for name, tensor in tensors.items():
            fits = all(size in (1, whole) for size, whole in zip(tensor.shape, shape, strict=False))
            if tensor.ndim and not (tensor.ndim == len(shape) and fits):
                expected, actual = tuple(shape), tuple(tensor.shape)
                message = f"{name}: must have the shape of the slots, {expected}, got {actual}"
                raise ShapeMismatchError(message, expected=expected, actual=actual)


def _shapes(tensors: dict[str, Tensor], ndim: int) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors.values() if tensor.ndim == ndim]


@dataclass(eq=False)
class LoopDecision:
    """Who halts after this loop, and why.

    Attributes:
        halt: ``[slots]`` bool.
        reasons: ``[slots]`` int8: the code of the reason where ``halt`` is set; elsewhere ``NO_REASON``, or the code
            of min_loops_not_met as a note.
        diagnostics: further small values, for logs.
    """

    halt: Tensor
    reasons: Tensor
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def action(self) -> str:
        """Either "continue" or "halt", for a decision about one slot; waits for the device."""
        return "halt" if self._only(self.halt) else "continue"

    @property
    def halt_reason(self) -> str | None:
        """The reason, or None where the slot continues; for a decision about one slot; waits for the device."""
        return reason_name(int(self._only(self.reasons))) if self._only(self.halt) else None

    def _only(self, values: Tensor) -> Any:
        if values.numel() != 1:
            message = f"a decision about {tuple(values.shape)} slots has no single answer; read halt and reasons"
            raise ShapeMismatchError(message, expected=(), actual=tuple(values.shape))
        return values.item()


class LoopScheduler(abc.ABC):
    """Decides after every loop which slots run another one.

    A subclass sets ``name``, implements :meth:`observe`, and takes its fields as keywords of its constructor, keeping
    each as an attribute of the same name. Bounds and budgets are not its business: the driver passes every answer
    through :func:`~cognexis.looping.schedulers.guard.apply_bounds`.
    """

    name: ClassVar[str]
    keeps_record: bool = True
    """Whether :meth:`finish` shall describe the request; the driver saves the work where nobody asked."""
    _trace: RequestTrace | None = None

    @property
    def signals(self) -> frozenset[str]:
        """Optional fields of the observation that :meth:`observe` reads; the driver measures only these.

        Of hidden_delta, relative_delta, confidence, margin, entropy, prediction_change and predicted_gain; the last
        stands for all outputs of the value head.
        """
        return frozenset()

    @property
    def trace(self) -> RequestTrace:
        """The record of the request so far."""
        if self._trace is None:
            self._trace = RequestTrace(HALT_REASONS)
        return self._trace

    def begin_request(self, context: SchedulerContext) -> None:
        """Start a request; whatever is left of another one is dropped."""
        self._trace = None

    @abc.abstractmethod
    def observe(self, observation: LoopObservation) -> LoopDecision:
        """Decide, elementwise over slots and without waiting for the device."""

    def finish(self) -> dict[str, Any]:
        """End the request and return its record, as :meth:`RequestTrace.summary` gives it; waits for the device.

        Without a request the record is that of no loops.
        """
        summary = self.trace.summary()
        self._trace = None
        return summary

    def record(self, observation: LoopObservation, decision: LoopDecision) -> LoopDecision:
        """Add a decision and the means of ``signals`` to the trace; returns the decision."""
        if not self.keeps_record:
            self.trace.note_loops(observation.loops)
            return decision
        values = {name: getattr(observation, name) for name in sorted(self.signals)}
        self.trace.add(observation.loops, decision.halt, decision.reasons, values, observation.is_active)
        return decision

    def select(self, rows: Tensor) -> None:
        """Keep only ``rows`` (indices of the first axis) of all state by slot: the others have left the batch."""
        self.trace.select(rows)

    def to_dict(self) -> dict[str, Any]:
        """The scheduler as JSON: "type" and the arguments of the constructor."""
        return {"type": self.name} | {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
