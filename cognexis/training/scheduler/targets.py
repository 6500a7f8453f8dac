"""What a value head is taught: the gain that further loops bring, measured.

With q_i the quality after loop i of L, a target belongs to each loop i = 1 .. L - 1:

    horizon next    gain_i = q_{i+1} - q_i
    horizon best    gain_i = max_{j > i} q_j - q_i        what stopping at i gives away, if the later stop is right

    loss_delta             q = -loss
    accuracy_delta         q = score
    answer_logprob_delta   q = log-probability of the answer
    binary_continue        1 where the gain of loss_delta exceeds a threshold, else 0
    compute_normalized     the gain of loss_delta per cost of the loops it takes: max_{j > i} (q_j - q_i) / (c (j - i))
    safety_adjusted        loss_delta, less risk_weight times the risk of answering after the later loop

No target ever rewards halting by itself. Letters: L loops; leading axes are free.
Source: Zhu et al. 2025, "Scaling Latent Reasoning via Looped Language Models" (measured improvement as the target).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError, ShapeMismatchError

HORIZONS = ("next", "best")


@dataclass(frozen=True)
class DepthMeasures:
    """What was measured at each loop, all ``[..., L]``; a target needs only what it names.

    Attributes:
        losses: in nats.
        scores: 0 to 1.
        answer_logprobs: in nats.
        risks: 0 or more.
    """

    losses: Tensor | None = None
    scores: Tensor | None = None
    answer_logprobs: Tensor | None = None
    risks: Tensor | None = None


@dataclass(frozen=True)
class TargetOptions:
    """Numbers that some targets need.

    Attributes:
        horizon: "next" or "best".
        threshold: smallest gain in nats that is worth continuing, for binary_continue.
        loop_cost: cost of one loop, above 0, for compute_normalized.
        risk_weight: gain that one unit of risk costs, for safety_adjusted.
    """

    horizon: str = "best"
    threshold: float = 0.0
    loop_cost: float = 1.0
    risk_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.horizon not in HORIZONS:
            raise InvalidConfigError(
                f"horizon={self.horizon!r}: must be one of {', '.join(HORIZONS)}", path="horizon", value=self.horizon
            )
        if not 0 < self.loop_cost < float("inf"):
            raise InvalidConfigError(
                f"loop_cost={self.loop_cost!r}: must be finite and positive", path="loop_cost", value=self.loop_cost
            )


def gain_targets(kind: str, measures: DepthMeasures, options: TargetOptions | None = None) -> Tensor:
    """The targets of loops 1 to L - 1, ``[..., L - 1]``.

    Args:
        kind: one of :data:`GAIN_TARGETS`.

    Raises:
        InvalidConfigError: an unknown kind, or a measure that the kind needs is missing.
        ShapeMismatchError: fewer than two loops.
    """
    if kind not in GAIN_TARGETS:
        raise InvalidConfigError(
            f"target={kind!r}: must be one of {', '.join(GAIN_TARGETS)}{nearest_name(kind, GAIN_TARGETS)}",
            path="target",
            value=kind,
        )
    return GAIN_TARGETS[kind](measures, options or TargetOptions())


def improvement(quality: Tensor, horizon: str, later_cost: Tensor | None = None) -> Tensor:
    """How much better ``quality`` ``[..., L]`` gets after each loop but the last.

    Args:
        later_cost: ``[..., L]``, taken off the later quality of each pair.
    """
    later = quality if later_cost is None else quality - later_cost
    ahead = later[..., 1:]
    if horizon == "best":
        ahead = ahead.flip(-1).cummax(-1).values.flip(-1)
    return ahead - quality[..., :-1]


def _loss_delta(measures: DepthMeasures, options: TargetOptions) -> Tensor:
    return improvement(-_needed(measures, "losses"), options.horizon)


def _accuracy_delta(measures: DepthMeasures, options: TargetOptions) -> Tensor:
    return improvement(_needed(measures, "scores"), options.horizon)


def _answer_logprob_delta(measures: DepthMeasures, options: TargetOptions) -> Tensor:
    return improvement(_needed(measures, "answer_logprobs"), options.horizon)


def _binary_continue(measures: DepthMeasures, options: TargetOptions) -> Tensor:
    gains = _loss_delta(measures, options)
    return (gains > options.threshold).to(gains.dtype)


def _compute_normalized(measures: DepthMeasures, options: TargetOptions) -> Tensor:
    quality = -_needed(measures, "losses")
    num_loops = quality.shape[-1]
    best = torch.full_like(quality[..., :-1], -torch.inf)
    for ahead in range(1, num_loops if options.horizon == "best" else 2):
        rate = (quality[..., ahead:] - quality[..., :-ahead]) / (options.loop_cost * ahead)
        best[..., : num_loops - ahead] = torch.maximum(best[..., : num_loops - ahead], rate)
    return best


def _safety_adjusted(measures: DepthMeasures, options: TargetOptions) -> Tensor:
    cost = options.risk_weight * _needed(measures, "risks")
    return improvement(-_needed(measures, "losses"), options.horizon, later_cost=cost)


GAIN_TARGETS: dict[str, Callable[[DepthMeasures, TargetOptions], Tensor]] = {
    "loss_delta": _loss_delta,
    "accuracy_delta": _accuracy_delta,
    "answer_logprob_delta": _answer_logprob_delta,
    "binary_continue": _binary_continue,
    "compute_normalized": _compute_normalized,
    "safety_adjusted": _safety_adjusted,
}


def _needed(measures: DepthMeasures, name: str) -> Tensor:
    values = getattr(measures, name)
    if values is None:
        raise InvalidConfigError(f"measures.{name}: this target needs it", path=f"measures.{name}")
    if values.ndim < 1 or values.shape[-1] < 2:
        raise ShapeMismatchError(
            f"measures.{name}: needs two loops or more, got shape {tuple(values.shape)}",
            expected=("...", "L >= 2"),
            actual=tuple(values.shape),
        )
    return values
