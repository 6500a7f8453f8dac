"""Confidence intervals by resampling examples (the percentile bootstrap).

The examples are drawn with replacement, the statistic is computed for each draw, and the interval holds the middle
``confidence_level`` of the values. Depths share a draw: example i is the same text at every depth, so what is
resampled is the whole column and differences between depths keep their pairing. The ends are values that occurred
(quantiles by the inverse distribution function), so the interval of a depth is made of depths. Draws come from
numpy's PCG64 with the seed, and are the same everywhere. Source: B. Efron, R. Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cognexis.errors import InvalidConfigError


@dataclass(frozen=True)
class Interval:
    """An interval and the share of draws in which the statistic had a value; no ends where it never had."""

    low: float | None
    high: float | None
    confidence_level: float
    defined_share: float


def check_resampling(confidence_level: float, num_resamples: int) -> None:
    """Raise unless the level lies between 0 and 1 and there is at least one draw."""
    if not 0 < confidence_level < 1:
        raise InvalidConfigError(f"confidence_level={confidence_level!r}: must lie between 0 and 1")
    if num_resamples < 1:
        raise InvalidConfigError(f"num_resamples={num_resamples!r}: must be 1 or more")


def interval_of(values: Sequence[float | None], confidence_level: float) -> Interval:
    """The middle ``confidence_level`` of the values that exist; each end is the smallest value with enough below."""
    defined = sorted(value for value in values if value is not None)
    if not defined:
        return Interval(None, None, confidence_level, 0.0)
    tails = ((1 - confidence_level) / 2, (1 + confidence_level) / 2)
    low, high = (defined[max(math.ceil(tail * len(defined) - 1e-9), 1) - 1] for tail in tails)
    return Interval(low, high, confidence_level, len(defined) / len(values))


def depth_columns(depths: Sequence[int], values: Sequence[float]) -> dict[int, np.ndarray]:
    """The values of each depth in the order given; ``[examples]`` each.

    Raises:
        InvalidConfigError: the depths have different numbers of values, or the lists different lengths.
    """
    if len(depths) != len(values):
        raise InvalidConfigError(f"depths and values have {len(depths)} and {len(values)} entries: must be equal")
    columns: dict[int, list[float]] = {}
    for depth, value in zip(depths, values, strict=True):
        columns.setdefault(depth, []).append(value)
    if len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(f"{len(column)} at depth {depth}" for depth, column in columns.items())
        raise InvalidConfigError(f"scores: a confidence interval needs the same examples at every depth, got {counts}")
    return {depth: np.asarray(column, dtype=np.float64) for depth, column in columns.items()}


def bootstrap_depths(
    depths: Sequence[int],
    scores: Sequence[float],
    compute: Sequence[float],
    statistic: Callable[[list[int], list[float], list[float]], Sequence[float | None]],
    *,
    confidence_level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[Interval] | None:
    """Intervals of what ``statistic`` computes from depths, mean scores and mean compute.

    Args:
        depths: ``[n]``; the i-th entry of each depth is the same example.
        scores: ``[n]`` score of one example at one depth.
        compute: ``[n]`` its cost.
        statistic: returns the same number of values for every draw.

    Returns:
        One interval per value; None where a depth has a single example, which cannot be resampled.

    Raises:
        InvalidConfigError: the depths have different examples, or a setting is out of range.
    """
    check_resampling(confidence_level, num_resamples)
    columns, costs = depth_columns(depths, scores), depth_columns(depths, compute)
    grid = list(columns)
    num_examples = len(columns[grid[0]]) if grid else 0
    if num_examples < 2:
        return None
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = []
    for _ in range(num_resamples):
        chosen = generator.integers(num_examples, size=num_examples)
        means = [columns[depth][chosen].mean().item() for depth in grid]
        drawn.append(statistic(grid, means, [costs[depth][chosen].mean().item() for depth in grid]))
    return [interval_of(values, confidence_level) for values in zip(*drawn, strict=True)]


def bootstrap_mean(
    scores: Sequence[float], *, confidence_level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """Interval of the mean of ``[n]`` scores; None for fewer than two."""
    found = bootstrap_depths(
        [1] * len(scores),
        scores,
        [0.0] * len(scores),
        lambda _, means, __: means,
        confidence_level=confidence_level,
        num_resamples=num_resamples,
        seed=seed,
    )
    return found[0] if found else None
