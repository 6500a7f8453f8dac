"""Halting by what the value head expects of the next loop.

A slot continues while value / loop_cost >= gain_threshold and else halts with the reason value_gain. With
``loop_thresholds`` the threshold after loop i is entry i of these, from 1, and beyond them the last. What value is
depends on ``output_kind``:

    predicted_gain        predicted_gain
    risk_adjusted_gain    effective_gain(predicted_gain, uncertainty, loop_cost)
    continue_logit        sigmoid(continue_logit), the probability that the next loop helps
    uncertainty           uncertainty, as an upper bound of what the next loop can gain

A NaN value continues.

Source: contract SCH-07, VAL-04.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognexis.configuration_rules import VALUE_OUTPUT_KINDS
from cognexis.looping.schedulers.base import LoopObservation, reason_code
from cognexis.looping.schedulers.fields import field_error, one_of, real_number
from cognexis.looping.schedulers.soft import Rules, SoftScheduler

DEFAULT_GAIN_THRESHOLD = 5e-4


def effective_gain(
    quality_gain: Tensor | float,
    risk: Tensor | float,
    cost: Tensor | float,
    *,
    risk_weight: float,
    latency_weight: float,
) -> Tensor | float:
    """Expected gain less what risk and time cost: quality_gain - risk_weight risk - latency_weight cost."""
    return quality_gain - risk_weight * risk - latency_weight * cost


@dataclass(eq=False)
class ValueHeadScheduler(SoftScheduler):
    """Halts when another loop is not worth its cost.

    Attributes:
        gain_threshold: finite and at least 0; None: 5e-4, or a probability of 0.5 for continue_logit.
        loop_cost: cost of one loop in the unit of the gain, finite and above 0.
        output_kind: which output of the value head counts, one of ``VALUE_OUTPUT_KINDS``.
        risk_weight: gain that one unit of uncertainty costs; for risk_adjusted_gain only.
        latency_weight: gain that one unit of ``loop_cost`` costs; for risk_adjusted_gain only.
        loop_thresholds: at least one, each finite and at least 0; None: ``gain_threshold`` after every loop.
    """

    name = "value_head"
    gain_threshold: float | None = None
    loop_cost: float = 1.0
    output_kind: str = "predicted_gain"
    risk_weight: float = 0.0
    latency_weight: float = 0.0
    loop_thresholds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output_kind = one_of("output_kind", self.output_kind, VALUE_OUTPUT_KINDS)
        if self.gain_threshold is None:
            self.gain_threshold = 0.5 if self.output_kind == "continue_logit" else DEFAULT_GAIN_THRESHOLD
        self.gain_threshold = real_number("gain_threshold", self.gain_threshold)
        self.loop_cost = real_number("loop_cost", self.loop_cost, is_positive=True)
        self.risk_weight = real_number("risk_weight", self.risk_weight)
        self.latency_weight = real_number("latency_weight", self.latency_weight)
        for name in ("risk_weight", "latency_weight"):
            if getattr(self, name) and self.output_kind != "risk_adjusted_gain":
                raise field_error(name, getattr(self, name), "needs output_kind='risk_adjusted_gain'")

        if self.loop_thresholds is not None:
            if isinstance(self.loop_thresholds, str) or not isinstance(self.loop_thresholds, Sequence):
                raise field_error("loop_thresholds", self.loop_thresholds, "must be a list of numbers, or None")
            if not self.loop_thresholds:
                raise field_error("loop_thresholds", self.loop_thresholds, "must hold at least one number")
            self.loop_thresholds = [real_number("loop_thresholds", value) for value in self.loop_thresholds]

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({"predicted_gain"})

    def rules(self, observation: LoopObservation, diagnostics: dict[str, Any]) -> Rules:
        value = self._value(observation) / self.loop_cost
        return [(self.below("value", value, self._threshold(observation.loops)), reason_code("value_gain"))]

    def _threshold(self, loop: int) -> float:
        if self.loop_thresholds is not None:
            return self.loop_thresholds[max(0, min(loop, len(self.loop_thresholds)) - 1)]
        assert self.gain_threshold is not None
        return self.gain_threshold

    def _value(self, observation: LoopObservation) -> Any:
        if self.output_kind == "continue_logit":
            return torch.sigmoid(self.needed(observation, "continue_logit"))
        if self.output_kind == "uncertainty":
            return self.needed(observation, "uncertainty")
        gain = self.needed(observation, "predicted_gain")
        if self.output_kind == "predicted_gain":
            return gain
        return effective_gain(
            gain,
            self.needed(observation, "uncertainty"),
            self.loop_cost,
            risk_weight=self.risk_weight,
            latency_weight=self.latency_weight,
        )
