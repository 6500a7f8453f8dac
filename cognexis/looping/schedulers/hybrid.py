"""Halting by measured change, confidence and predicted gain together.

In this order:

    (a) delta > large_delta                                            continue
    (b) delta < min_delta and gain < gain_threshold                    halt, value_gain
    (c) confidence > confidence_threshold
        and gain < high_conf_gain_threshold                            halt, confidence
    (d) with gain_fallthrough: gain / loop_cost < gain_threshold       halt, value_gain
    otherwise                                                          continue

(a) is left out where ``large_delta`` is None, (c) where ``confidence_threshold`` is.

Source: contract SCH-08, D-05; ``min_delta`` as in S-25.
"""

from dataclasses import dataclass
from typing import Any

from cognexis.looping.schedulers.base import LoopObservation, reason_code
from cognexis.looping.schedulers.fields import field_error, one_of, optional_number, real_number
from cognexis.looping.schedulers.soft import DELTA_KINDS, Rules, SoftScheduler
from cognexis.looping.schedulers.value_head import DEFAULT_GAIN_THRESHOLD


@dataclass(eq=False)
class HybridScheduler(SoftScheduler):
    """Halts only where the value head agrees with what is measured.

    Attributes:
        min_delta: finite and at least 0.
        delta_kind: "relative" or "absolute".
        large_delta: finite and above ``min_delta``.
        confidence_threshold: in [0, 1].
        gain_threshold: finite and at least 0.
        high_conf_gain_threshold: finite and at least 0; None: as ``gain_threshold``.
        loop_cost: cost of one loop in the unit of the gain, finite and above 0.
        gain_fallthrough: whether rule (d) is on.
    """

    name = "hybrid"
    min_delta: float = 0.03
    delta_kind: str = "relative"
    large_delta: float | None = None
    confidence_threshold: float | None = 0.95
    gain_threshold: float = DEFAULT_GAIN_THRESHOLD
    high_conf_gain_threshold: float | None = None
    loop_cost: float = 1.0
    gain_fallthrough: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.min_delta = real_number("min_delta", self.min_delta)
        self.delta_kind = one_of("delta_kind", self.delta_kind, DELTA_KINDS)
        self.large_delta = optional_number("large_delta", self.large_delta)
        if self.large_delta is not None and self.large_delta <= self.min_delta:
            raise field_error("large_delta", self.large_delta, f"must be above min_delta={self.min_delta}")
        self.confidence_threshold = optional_number("confidence_threshold", self.confidence_threshold, at_most=1.0)
        self.gain_threshold = real_number("gain_threshold", self.gain_threshold)
        name = "high_conf_gain_threshold"
        self.high_conf_gain_threshold = optional_number(name, self.high_conf_gain_threshold)
        if self.high_conf_gain_threshold is not None and self.confidence_threshold is None:
            raise field_error(name, self.high_conf_gain_threshold, "needs a confidence_threshold")
        self.loop_cost = real_number("loop_cost", self.loop_cost, is_positive=True)
        if not isinstance(self.gain_fallthrough, bool):
            raise field_error("gain_fallthrough", self.gain_fallthrough, "must be True or False")

    @property
    def signals(self) -> frozenset[str]:
        confidence = set() if self.confidence_threshold is None else {"confidence"}
        return frozenset({self._delta, "predicted_gain"} | confidence)

    def rules(self, observation: LoopObservation, diagnostics: dict[str, Any]) -> Rules:
        delta = self.needed(observation, self._delta)
        gain = self.needed(observation, "predicted_gain")
        is_at_rest = self.below("delta", delta, self.min_delta)
        rules = [(is_at_rest & self.below("gain", gain, self.gain_threshold), reason_code("value_gain"))]
        if self.confidence_threshold is not None:
            confidence = self.needed(observation, "confidence")
            limit = self.high_conf_gain_threshold
            is_sure = self.above("confidence", confidence, self.confidence_threshold)
            gains_little = self.below("sure_gain", gain, self.gain_threshold if limit is None else limit)
            rules.append((is_sure & gains_little, reason_code("confidence")))
        if self.gain_fallthrough:
            is_dear = self.below("gain_per_cost", gain / self.loop_cost, self.gain_threshold)
            rules.append((is_dear, reason_code("value_gain")))
        if self.large_delta is not None:
            is_calm = ~(delta > self.large_delta)
            rules = [(holds & is_calm, code) for holds, code in rules]
        return rules

    @property
    def _delta(self) -> str:
        return "relative_delta" if self.delta_kind == "relative" else "hidden_delta"
