"""Overthinking threshold: The deepest loop before further loops harm the quality of a model of recurrent depth.

OT = min { d : M(d') < M(d) - tolerance } for neighbouring depths d < d', with the sign turned for losses;
d' is the first harmful depth.

The functions are copied from the package cognexis, which this file does not need.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import datasets
import evaluate
import numpy as np

InvalidConfigError = ValueError

DIRECTIONS = ("higher_is_better", "lower_is_better")


class Undefined(StrEnum):
    """Why a depth metric has no value."""

    FEWER_THAN_TWO_DEPTHS = "fewer_than_two_depths"
    COMPUTE_DOES_NOT_INCREASE = "compute_does_not_increase"
    ZERO_BASELINE = "zero_baseline"
    NO_DEPTH_HELPS = "no_depth_helps"
    OUT_OF_RANGE = "out_of_range"
    NOT_REACHED = "not_reached"


@dataclass(frozen=True)
class Overthinking:
    """OT, the deepest loop before the first harmful step, and the depth that this step leads to."""

    depth: int | None
    first_harmful_depth: int | None
    undefined: Undefined | None = None


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the names."""
    if value not in allowed:
        raise InvalidConfigError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def not_negative(name: str, value: float) -> None:
    """Raise unless ``value`` is finite and 0 or more."""
    if not (math.isfinite(value) and value >= 0):
        raise InvalidConfigError(f"{name}={value!r}: must be a finite number of 0 or more")


def depth_table(
    depths: Sequence[int], scores: Sequence[float], compute: Sequence[float] | None
) -> dict[int, tuple[float, float]]:
    """Mean score and mean compute by depth, shallowest first; the compute is 0 where none is given.

    Raises:
        InvalidConfigError: a depth is no positive integer, a number is not finite, a compute is negative, or the
            lists have different lengths.
    """
    compute = [0.0] * len(depths) if compute is None else compute
    if not len(depths) == len(scores) == len(compute):
        raise InvalidConfigError(
            f"depths, scores and compute have {len(depths)}, {len(scores)} and {len(compute)} entries: must be equal"
        )
    rows: dict[int, list[tuple[float, float]]] = {}
    for depth, score, cost in zip(depths, scores, compute, strict=True):
        if isinstance(depth, bool) or not float(depth).is_integer() or depth < 1:
            raise InvalidConfigError(f"depths: {depth!r} must be an integer of 1 or more")
        if not math.isfinite(score):
            raise InvalidConfigError(f"scores: {score!r} at depth {depth} must be a finite number")
        not_negative(f"compute at depth {depth}", cost)
        rows.setdefault(int(depth), []).append((float(score), float(cost)))
    means = {}
    for depth in sorted(rows):
        columns = zip(*rows[depth], strict=True)
        score, cost = (math.fsum(number / len(rows[depth]) for number in column) for column in columns)
        means[depth] = (score, cost)
    return means


def gain(shallow: float, deep: float, direction: str) -> float:
    """How much better ``deep`` is; negative if it is worse."""
    one_of("direction", direction, DIRECTIONS)
    return deep - shallow if direction == "higher_is_better" else shallow - deep


def overthinking_threshold(
    depths: Sequence[int],
    scores: Sequence[float],
    *,
    direction: str = "higher_is_better",
    tolerance: float = 0.0,
) -> Overthinking:
    """OT: the depth before the first step that makes the score worse by more than ``tolerance``.

    Raises:
        InvalidConfigError: an unknown direction, a negative tolerance, or numbers that ``depth_table`` refuses.
    """
    one_of("direction", direction, DIRECTIONS)
    not_negative("tolerance", tolerance)
    table = depth_table(depths, scores, None)
    if len(table) < 2:
        return Overthinking(None, None, Undefined.FEWER_THAN_TWO_DEPTHS)
    ordered = list(table)
    for depth, deeper in pairwise(ordered):
        score, next_score = table[depth][0], table[deeper][0]
        drop = -gain(score, next_score, direction)
        rounding = 4 * math.ulp(max(abs(score), abs(next_score)))
        if drop > tolerance and not math.isclose(drop, tolerance, abs_tol=rounding):
            return Overthinking(depth, deeper)
    return Overthinking(None, None, Undefined.NOT_REACHED)


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


@dataclass(frozen=True)
class DepthOptions:
    """What the four metrics are told alike; each reads what it needs.

    Attributes:
        direction: "higher_is_better" or "lower_is_better".
        definition: headline of the saturation point; None: "max_dei".
        form: of the efficiency, "pairwise" or "baseline".
        threshold: efficiency below which another loop does not pay; None: 0.
        tolerance: loss of quality that does not count as overthinking.
        compute_unit: the unit of ``compute``, repeated in the result.
        confidence_level: of the intervals, between 0 and 1; None: no intervals.
        num_resamples: draws of the bootstrap.
        seed: of the draws.
    """

    direction: str = "higher_is_better"
    definition: str | None = None
    form: str = "pairwise"
    threshold: float | None = None
    tolerance: float = 0.0
    compute_unit: str = "flops_per_token"
    confidence_level: float | None = None
    num_resamples: int = 1000
    seed: int = 0


Depths = Sequence[int]
Numbers = Sequence[float]


def ot_results(depths: Depths, scores: Numbers, compute: Numbers, options: DepthOptions) -> dict[str, Any]:
    """Overthinking threshold, and the depth that is the first to harm."""

    def statistic(depths: Depths, scores: Numbers, compute: Numbers) -> list[float | None]:
        found = overthinking_threshold(depths, scores, direction=options.direction, tolerance=options.tolerance)
        return [found.depth]

    found = overthinking_threshold(depths, scores, direction=options.direction, tolerance=options.tolerance)
    return {
        "overthinking_threshold": found.depth,
        "overthinking_threshold_tolerance": options.tolerance,
        "first_harmful_depth": found.first_harmful_depth,
        "overthinking_threshold_undefined": found.undefined and found.undefined.value,
        **interval_results("overthinking_threshold", depths, scores, compute, statistic, options),
    }


def interval_results(
    name: str,
    depths: Depths,
    scores: Numbers,
    compute: Numbers,
    statistic: Callable[[list[int], list[float], list[float]], Sequence[float | None]],
    options: DepthOptions,
    as_list: bool = False,
) -> dict[str, Any]:
    """The interval keys of one metric; none unless intervals are asked for."""
    if options.confidence_level is None:
        return {}
    intervals = bootstrap_depths(
        depths,
        scores,
        compute,
        statistic,
        confidence_level=options.confidence_level,
        num_resamples=options.num_resamples,
        seed=options.seed,
    )
    keys = (f"{name}_confidence_interval", f"{name}_defined_share")
    if intervals is None:
        return dict.fromkeys(keys)
    ends = [None if interval.low is None else [interval.low, interval.high] for interval in intervals]
    shares = [interval.defined_share for interval in intervals]
    return dict(zip(keys, (ends, shares) if as_list else (ends[0], shares[0]), strict=True))


_DESCRIPTION = """The deepest loop before further loops harm the quality of a model of recurrent depth.

OT = min { d : M(d') < M(d) - tolerance } for neighbouring depths d < d', with the sign turned for losses;
d' is the first harmful depth.
"""

_INPUTS = """
Args:
    depths: loop counts in any order; a depth that occurs more than once has one entry per example.
    scores: the quality at that depth, one number per entry.
    compute: the cost at that depth, one number per entry, in one unit.
    direction: "higher_is_better" or "lower_is_better".
    definition: headline of the loop saturation point: "max_dei" (default), "threshold" or "baseline_argmax".
    form: of the depth efficiency index: "pairwise" (default) or "baseline".
    threshold: efficiency below which another loop does not pay; default 0.
    tolerance: loss of quality that does not count as overthinking.
    compute_unit: the unit of compute, repeated in the result.
    confidence_level: adds bootstrap intervals over examples; default none.
    num_resamples: draws of the bootstrap.
    seed: of the draws.
    Other keywords are ignored, so that the metric can be combined with others.

Examples:
    >>> metric = evaluate.load("overthinking_threshold")
    >>> result = metric.compute(depths=[1, 2, 4, 8], scores=[0.50, 0.70, 0.72, 0.69], compute=[10, 20, 40, 80])
    >>> result["overthinking_threshold"]
    4
"""

_NEEDS_COMPUTE = False


class OverthinkingThreshold(evaluate.Metric):
    """Overthinking threshold as a module of ``evaluate``."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "depths": datasets.Value("int64"),
                    "scores": datasets.Value("float64"),
                    "compute": datasets.Value("float64"),
                }
            ),
        )

    def add_batch(self, *, depths=None, scores=None, compute=None, **others):
        """Add entries; compute may be left out where the metric reads none."""
        for name, values in (("depths", depths), ("scores", scores), ("compute", compute)):
            if values is None and (name != "compute" or _NEEDS_COMPUTE):
                raise ValueError(f"{name}: missing; overthinking_threshold needs one number per entry")
        depths, scores = list(depths), list(scores)
        compute = [0.0] * len(depths) if compute is None else list(compute)
        if not len(depths) == len(scores) == len(compute):
            raise ValueError(
                f"depths, scores and compute have {len(depths)}, {len(scores)} and {len(compute)} entries: "
                "must be equal"
            )
        super().add_batch(depths=depths, scores=scores, compute=compute, **others)

    def _compute(
        self,
        depths,
        scores,
        compute,
        direction="higher_is_better",
        definition=None,
        form="pairwise",
        threshold=None,
        tolerance=0.0,
        compute_unit="flops_per_token",
        confidence_level=None,
        num_resamples=1000,
        seed=0,
        **others,
    ):
        options = DepthOptions(
            direction=direction,
            definition=definition,
            form=form,
            threshold=threshold,
            tolerance=tolerance,
            compute_unit=compute_unit,
            confidence_level=confidence_level,
            num_resamples=num_resamples,
            seed=seed,
        )
        for name in others:
            if near := difflib.get_close_matches(name, inspect.signature(DepthOptions).parameters, n=1, cutoff=0.8):
                raise ValueError(f"{name}: unknown keyword; did you mean {near[0]}?")
        return ot_results(list(depths), list(scores), list(compute), options)
