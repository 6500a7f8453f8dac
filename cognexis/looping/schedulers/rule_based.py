"""Halting by thresholds on measured signals, without a learned part.

In this order; a rule whose threshold is None, or a ``min_delta`` of 0, never halts:

    delta < min_delta                        min_delta     delta is the relative or the absolute change of the state
    prediction_change < kl_threshold         min_delta     KL divergence of successive predictions, in nats
    confidence > confidence_threshold        confidence
    entropy < entropy_threshold              confidence    in nats

Source: contract SCH-06, S-25.
"""

from dataclasses import dataclass
from typing import Any

from cognexis.looping.schedulers.base import LoopObservation, reason_code
from cognexis.looping.schedulers.fields import one_of, optional_number, real_number
from cognexis.looping.schedulers.soft import DELTA_KINDS, Rules, SoftScheduler


@dataclass(eq=False)
class RuleBasedScheduler(SoftScheduler):
    """Halts when the state or the prediction has come to rest, or the prediction is sure.

    Attributes:
        min_delta: finite and at least 0; 0 switches the rule off.
        delta_kind: "relative" or "absolute".
        confidence_threshold: in [0, 1].
        entropy_threshold: finite and at least 0.
        kl_threshold: finite and at least 0.
    """

    name = "rule_based"
    min_delta: float = 0.03
    delta_kind: str = "relative"
    confidence_threshold: float | None = None
    entropy_threshold: float | None = None
    kl_threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.min_delta = real_number("min_delta", self.min_delta)
        self.delta_kind = one_of("delta_kind", self.delta_kind, DELTA_KINDS)
        self.confidence_threshold = optional_number("confidence_threshold", self.confidence_threshold, at_most=1.0)
        self.entropy_threshold = optional_number("entropy_threshold", self.entropy_threshold)
        self.kl_threshold = optional_number("kl_threshold", self.kl_threshold)

    @property
    def signals(self) -> frozenset[str]:
        return frozenset(name for name, *_ in self._comparisons())

    def rules(self, observation: LoopObservation, diagnostics: dict[str, Any]) -> Rules:
        rules = []
        for name, is_above, threshold, reason in self._comparisons():
            compare = self.above if is_above else self.below
            rules.append((compare(name, self.needed(observation, name), threshold), reason_code(reason)))
        return rules

    def _comparisons(self) -> list[tuple[str, bool, float, str]]:
        """Signal, whether it must be above, threshold and reason of every rule that is on, in order."""
        delta = "relative_delta" if self.delta_kind == "relative" else "hidden_delta"
        table = [
            (delta, False, self.min_delta or None, "min_delta"),
            ("prediction_change", False, self.kl_threshold, "min_delta"),
            ("confidence", True, self.confidence_threshold, "confidence"),
            ("entropy", False, self.entropy_threshold, "confidence"),
        ]
        return [(name, above, threshold, why) for name, above, threshold, why in table if threshold is not None]
