"""Quality against loops, simulated on depth traces.

A policy halts a token after loop i where its signal is below (or above) a threshold, not before ``min_loops`` and at
the last loop in any case; the dependency says whose agreement it needs (see ``cognexis.looping.token_mask``). The
token's answer is then that of loop i. This is what a run gives where whole rows halt (``row``), and what a run with
the same decisions would give if the states of halted tokens went on looping (``token``, ``prefix``); see ``runs`` for
what these really give. Sweeping the threshold gives a frontier of points

    (mean loops over real tokens, mean loss and accuracy over tokens with a target).

    constant       every token runs the same number of loops
    oracle         knows every loss and spends the next loops where they lower the loss most per loop: the lower
                   convex hull of what any policy can reach, mixtures included. A token without a target runs once
    loops regret   mean loops less those of the oracle at the same loss
    loss regret    loss less that of the oracle at the same mean loops

Letters: R rows, T tokens, L loops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cognexis.errors import InvalidConfigError
from cognexis.looping.token_mask import HALT_DEPENDENCIES, may_halt
from cognexis.training.scheduler.traces import DepthTraces

SMALLEST_THRESHOLD = 1e-6
_EXACT = 1e-9


@dataclass(frozen=True)
class Policy:
    """A rule with one threshold.

    Attributes:
        name: in tables and files.
        signal: ``[R, T, L]``.
        halts_below: halt where the signal is below the threshold, else where it is above.
        settings: the scheduler that applies the rule, without its threshold.
        field: the field of that scheduler that takes the threshold; None for what no scheduler can do.
    """

    name: str
    signal: Tensor
    halts_below: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    field: str | None = None

    def halts(self, threshold: float) -> Tensor:
        """Where the rule holds, ``[R, T, L]`` bool; NaN never halts."""
        return self.signal < threshold if self.halts_below else self.signal > threshold

    def scheduler(self, threshold: float) -> dict[str, Any]:
        """The scheduler's settings for ``scheduler.json``."""
        return {**self.settings, str(self.field): threshold}


def policies_of(traces: DepthTraces, head: Any = None) -> dict[str, Policy]:
    """The rule-based policies on the signals of ``traces``, and with ``head`` that of the value head, by name."""
    off = {"type": "rule_based", "min_delta": 0.0}
    signals = traces.signals
    table = [
        Policy("relative_delta", signals["relative_delta"], True, {"type": "rule_based"}, "min_delta"),
        Policy("confidence", signals["confidence"], False, off, "confidence_threshold"),
        Policy("prediction_change", signals["prediction_change"], True, off, "kl_threshold"),
    ]
    if head is not None:
        values = traces.predictions(head)
        values = values.sigmoid() if head.output_kind == "continue_logit" else values
        settings = {"type": "value_head", "output_kind": head.output_kind}
        table.append(Policy("value_head", values, True, settings, "gain_threshold"))
    return {policy.name: policy for policy in table}


def halting_loops(halts: Tensor, is_real: Tensor, dependency: str = "token", min_loops: int = 1) -> Tensor:
    """Loops ``[R, T]`` that each token runs; 0 at padding.

    Args:
        halts: ``[R, T, L]`` bool, where the rule holds after each loop.
        is_real: ``[R, T]`` bool.

    Raises:
        InvalidConfigError: an unknown dependency, or ``min_loops`` outside 1 to L.
    """
    num_loops = halts.shape[-1]
    if dependency not in HALT_DEPENDENCIES:
        raise InvalidConfigError(
            f"halt_dependency={dependency!r}: must be one of {', '.join(HALT_DEPENDENCIES)}",
            path="halt_dependency",
            value=dependency,
        )
    if not 1 <= min_loops <= num_loops:
        raise InvalidConfigError(f"min_loops={min_loops}: must lie between 1 and {num_loops}", path="min_loops")
    active = is_real.clone()
    loops = torch.zeros(is_real.shape, dtype=torch.long)
    for index in range(num_loops):
        loops += active
        if index + 1 >= min_loops:
            settled = halts[..., index]
            active &= ~(settled & may_halt(settled, active, dependency))
    return loops


def outcome(traces: DepthTraces, loops: Tensor) -> dict[str, float]:
    """Mean loops, loss and accuracy when each token answers after its ``loops`` ``[R, T]``."""
    chosen = (loops - 1).clamp(min=0)[..., None]
    mask = traces.has_target
    loss = traces.losses.gather(-1, chosen).squeeze(-1)[mask]
    score = traces.scores.gather(-1, chosen).squeeze(-1)[mask]
    return {
        "mean_loops": loops[traces.is_real].double().mean().item(),
        "loss": loss.double().mean().item(),
        "accuracy": score.double().mean().item(),
    }


def constant_frontier(traces: DepthTraces) -> list[dict[str, float]]:
    """A point for every depth; ``threshold`` is the depth."""
    points = []
    for depth in range(1, traces.num_loops + 1):
        points.append({"threshold": float(depth), **outcome(traces, traces.is_real.long() * depth)})
    return points


def frontier(
    traces: DepthTraces,
    policy: Policy,
    *,
    dependency: str = "token",
    min_loops: int = 1,
    thresholds: Sequence[float] | None = None,
) -> list[dict[str, float]]:
    """A point for every threshold, in the order of their mean loops.

    Args:
        thresholds: by default quantiles of the signal over real tokens.
    """
    points = []
    for threshold in default_thresholds(traces, policy) if thresholds is None else thresholds:
        loops = halting_loops(policy.halts(threshold), traces.is_real, dependency, min_loops)
        points.append({"threshold": threshold, **outcome(traces, loops)})
    return sorted(points, key=lambda point: (point["mean_loops"], point["loss"]))


def default_thresholds(traces: DepthTraces, policy: Policy, count: int = 40) -> list[float]:
    """Quantiles of the signal, and steps of equal ratio towards the end at which the rule halts late; all above 0."""
    values = policy.signal[traces.is_real].double()
    values = values[values.isfinite()].sort().values
    quantiles = values[torch.linspace(0, len(values) - 1, count).round().long()]
    distance = values if policy.halts_below else 1 - values.flip(0)
    largest = max(distance[-1].item(), SMALLEST_THRESHOLD)
    nearest = distance[distance > 0].min().item() if (distance > 0).any() else 0.0
    smallest = max(nearest, SMALLEST_THRESHOLD, largest / 1e6)
    steps = torch.logspace(math.log10(smallest), math.log10(largest), count, dtype=torch.float64)
    found = torch.cat((quantiles, steps if policy.halts_below else 1 - steps))
    return found[found >= SMALLEST_THRESHOLD].unique().tolist() or [SMALLEST_THRESHOLD]


def cheapest_point(points: Sequence[dict[str, float]], largest_loss: float) -> dict[str, float] | None:
    """The point with the fewest mean loops among those whose loss is at most ``largest_loss``; None if none is."""
    good = [point for point in points if point["loss"] <= largest_loss + _EXACT]
    return min(good, key=lambda point: (point["mean_loops"], point["loss"])) if good else None


def oracle_frontier(traces: DepthTraces, max_points: int = 500) -> list[dict[str, float]]:
    """Points of the oracle from few loops to many; ``threshold`` is the gain per loop of the last loops spent.

    Args:
        max_points: of the corners of the hull so many are kept, evenly spaced.
    """
    losses = traces.losses[traces.has_target].double()  # [N, L]
    place = torch.zeros(len(losses), dtype=torch.long)
    loop = torch.arange(losses.shape[1])
    rates, steps = [], []
    while True:  # every token goes to the next corner of its own hull, until none gets better
        ahead = loop - place[:, None]
        rate = (losses.gather(1, place[:, None]) - losses) / ahead
        best, target = torch.where(ahead > 0, rate, -torch.inf).max(dim=1)
        moves = best > 0
        if not moves.any():
            break
        rates.append(best[moves])
        steps.append((target - place)[moves])
        place = torch.where(moves, target, place)
    rate, step = torch.cat([*rates, torch.zeros(0)]), torch.cat([*steps, torch.zeros(0)])
    order = rate.argsort(descending=True, stable=True)
    rate, step = rate[order], step[order]
    spent = nn.functional.pad(step.cumsum(0), (1, 0)) / traces.is_real.sum()
    gained = nn.functional.pad((rate * step).cumsum(0), (1, 0)) / len(losses)
    price = nn.functional.pad(rate, (1, 0), value=rate[0].item() if len(rate) else 0.0)
    chosen = torch.linspace(0, len(price) - 1, min(max_points, len(price))).round().long()
    points = torch.stack((price, 1 + spent, losses[:, 0].mean() - gained), dim=1)[chosen]
    return [dict(zip(("threshold", "mean_loops", "loss"), point, strict=True)) for point in points.tolist()]


def regret(point: dict[str, float], oracle: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Distance of ``point`` to the points of :func:`oracle_frontier`; None where these have nothing comparable."""
    loops, losses = [p["mean_loops"] for p in oracle], [p["loss"] for p in oracle]
    as_good = _interpolated(point["loss"], losses[::-1], loops[::-1])
    as_cheap = _interpolated(point["mean_loops"], loops, losses)
    return {
        "loops_regret": None if as_good is None else point["mean_loops"] - as_good,
        "loss_regret": None if as_cheap is None else point["loss"] - as_cheap,
    }


def _interpolated(at: float, x: list[float], y: list[float]) -> float | None:
    """The piecewise linear y at ``at`` over rising ``x``; the last y beyond them, None before them."""
    if at < x[0] - _EXACT:
        return None
    place = next((index for index, value in enumerate(x) if value >= at), None)
    if place is None or place == 0:
        return y[0] if place == 0 else y[-1]
    share = (at - x[place - 1]) / ((x[place] - x[place - 1]) or 1.0)
    return y[place - 1] + share * (y[place] - y[place - 1])


def loop_thresholds(predictions: Tensor, gains: Tensor, tolerance: float) -> list[float]:
    """A threshold for each loop: the largest at which the slots that halt give away ``tolerance`` at most on average.

    Args:
        predictions: ``[N, L - 1]`` after loops 1 to L - 1.
        gains: ``[N, L - 1]`` measured best gains.
        tolerance: mean gain in nats, over all N slots, that halting at one loop may give away.

    Returns:
        L - 1 thresholds of at least the smallest that schedulers take.
    """
    chosen = []
    for predicted, measured in zip(predictions.T, gains.T, strict=True):
        values, order = predicted.sort()
        given_away = measured.clamp(min=0)[order].double().cumsum(0) / len(order)
        count = int((given_away <= tolerance).sum())  # the sum never falls, so these are the first
        edge = values[count].item() if count < len(values) else values[-1].item() + SMALLEST_THRESHOLD
        chosen.append(max(edge, SMALLEST_THRESHOLD))
    return chosen
