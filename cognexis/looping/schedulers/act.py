"""Halting by a ponder penalty, after adaptive computation time (ACT).

    halt_probability = sigmoid(-continue_logit)
    ponder_penalty   = ponder_cost * (loops + 1)
    effective_gain   = predicted_gain - risk_weight uncertainty - ponder_penalty

A slot halts, always with the reason value_gain, where halt_probability >= halting_threshold, or effective_gain <=
gain_threshold, or uncertainty >= uncertainty_limit. These three are not strict. A test without its signal in the
observation is left out, for a value head has one kind of output; the logit or the gain must be there, and a
``risk_weight`` needs the uncertainty.

Graves 2016, Adaptive Computation Time for Recurrent Neural Networks, accumulates halting probabilities over loops and
trains with the penalty; here each loop is judged by itself and the penalty only raises the bar.

Source: contract SCH-10.
"""

from dataclasses import dataclass
from typing import Any

import torch

from cognexis.looping.schedulers.base import LoopObservation, reason_code
from cognexis.looping.schedulers.fields import real_number
from cognexis.looping.schedulers.soft import Rules, SoftScheduler
from cognexis.looping.schedulers.value_head import DEFAULT_GAIN_THRESHOLD, effective_gain


@dataclass(eq=False)
class ActScheduler(SoftScheduler):
    """Halts when the head says so, when pondering costs more than it gains, or when the head is too unsure.

    Attributes:
        halting_threshold: probability in [0, 1].
        gain_threshold: finite and at least 0.
        ponder_cost: gain that every loop must bring more than the one before, finite and at least 0.
        uncertainty_limit: finite and at least 0.
        risk_weight: gain that one unit of uncertainty costs, finite and at least 0.
    """

    name = "act"
    halting_threshold: float = 0.5
    gain_threshold: float = DEFAULT_GAIN_THRESHOLD
    ponder_cost: float = 0.01
    uncertainty_limit: float = 0.95
    risk_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.halting_threshold = real_number("halting_threshold", self.halting_threshold, at_most=1.0)
        for name in ("gain_threshold", "ponder_cost", "uncertainty_limit", "risk_weight"):
            setattr(self, name, real_number(name, getattr(self, name)))

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({"predicted_gain"})

    def rules(self, observation: LoopObservation, diagnostics: dict[str, Any]) -> Rules:
        loose, halts = 1 + self.hysteresis, torch.zeros(observation.shape, dtype=torch.bool, device=observation.device)
        tests: list[tuple[str, Any, float]] = []
        if observation.continue_logit is not None or observation.predicted_gain is None:
            diagnostics["halt_probability"] = torch.sigmoid(-self.needed(observation, "continue_logit"))
            tests.append(("probability", diagnostics["halt_probability"], self.halting_threshold))
        if observation.uncertainty is not None or self.risk_weight:
            tests.append(("uncertainty", self.needed(observation, "uncertainty"), self.uncertainty_limit))
        for name, signal, limit in tests:
            halts = halts | self.keeps(name, signal >= limit, signal >= limit / loose)
        if observation.predicted_gain is not None:
            gain: Any = self.needed(observation, "predicted_gain")
            if self.risk_weight:
                risk = self.needed(observation, "uncertainty")
                gain = effective_gain(gain, risk, 0.0, risk_weight=self.risk_weight, latency_weight=0.0)
            diagnostics["ponder_penalty"] = self.ponder_cost * (observation.loops + 1)
            diagnostics["effective_gain"] = gain = gain - diagnostics["ponder_penalty"]
            halts = halts | self.keeps("gain", gain <= self.gain_threshold, gain <= self.gain_threshold * loose)
        return [(halts, reason_code("value_gain"))]
