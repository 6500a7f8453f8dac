"""What more loops buy: four metrics of the quality M and the compute C of one model at several depths.

Depths are sorted first; d and d' are neighbours, g(a, b) is the gain from depth a to depth b, M(b) - M(a), or
M(a) - M(b) where lower is better.

    DEI(d, d') = g(d, d') / (C(d') - C(d))                pairwise; in the baseline form d is the shallowest depth
    LSP        = the depth where another loop stops paying, in one of three definitions:
                 max_dei          the deeper depth of the neighbours with the largest positive DEI
                 threshold        the first d with DEI(d, d') < threshold
                 baseline_argmax  the depth with the largest positive DEI against the shallowest
    OT         = the first d with g(d, d') < -tolerance;  d' is the first harmful depth
    DGR        = g(shallow, deep) / |M(shallow)|          shallowest and deepest unless given

Several scores of one depth are examples or seeds; M and C are their means. Of equal efficiencies the shallower depth
counts, and a difference within rounding harms nobody. A value that does not exist is None with a reason: one depth
only, compute that does not increase, a baseline of zero, no depth that helps, nothing reached within the grid, or a
quotient too large for a float.
Source: section 20 of the specification of Cognexis, "DEI, LSP, OT, DGR".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from cognexis.errors import InvalidConfigError

DIRECTIONS = ("higher_is_better", "lower_is_better")
FORMS = ("pairwise", "baseline")
DEFINITIONS = ("max_dei", "threshold", "baseline_argmax")


class Undefined(StrEnum):
    """Why a depth metric has no value."""

    FEWER_THAN_TWO_DEPTHS = "fewer_than_two_depths"
    COMPUTE_DOES_NOT_INCREASE = "compute_does_not_increase"
    ZERO_BASELINE = "zero_baseline"
    NO_DEPTH_HELPS = "no_depth_helps"
    OUT_OF_RANGE = "out_of_range"
    NOT_REACHED = "not_reached"


@dataclass(frozen=True)
class DepthEfficiency:
    """DEI between two depths: quality per unit of compute."""

    shallow: int
    deep: int
    value: float | None
    undefined: Undefined | None = None


@dataclass(frozen=True)
class LoopSaturation:
    """LSP in one definition."""

    depth: int | None
    definition: str
    undefined: Undefined | None = None


@dataclass(frozen=True)
class Overthinking:
    """OT, the deepest loop before the first harmful step, and the depth that this step leads to."""

    depth: int | None
    first_harmful_depth: int | None
    undefined: Undefined | None = None


@dataclass(frozen=True)
class DepthGain:
    """DGR between two depths: the part of the shallow score that was gained."""

    shallow: int | None
    deep: int | None
    value: float | None
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


def depth_efficiency_index(
    depths: Sequence[int],
    scores: Sequence[float],
    compute: Sequence[float],
    *,
    direction: str = "higher_is_better",
    form: str = "pairwise",
) -> list[DepthEfficiency]:
    """DEI of each pair of neighbours, or of each deeper depth against the shallowest; empty for one depth.

    Args:
        depths: ``[n]`` loop counts in any order, repeated for several examples.
        scores: ``[n]`` values of one metric.
        compute: ``[n]`` cost at that depth, in any one unit.
        form: "pairwise" or "baseline".

    Raises:
        InvalidConfigError: an unknown direction or form, or numbers that ``depth_table`` refuses.
    """
    one_of("direction", direction, DIRECTIONS)
    one_of("form", form, FORMS)
    table = depth_table(depths, scores, compute)
    ordered = list(table)
    pairs = pairwise(ordered) if form == "pairwise" else ((ordered[0], d) for d in ordered[1:])
    found = []
    for shallow, deep in pairs:
        (score, cost), (deep_score, deep_cost) = table[shallow], table[deep]
        if deep_cost <= cost:
            found.append(DepthEfficiency(shallow, deep, None, Undefined.COMPUTE_DOES_NOT_INCREASE))
            continue
        value = gain(score, deep_score, direction) / (deep_cost - cost)
        reached = (value, None) if math.isfinite(value) else (None, Undefined.OUT_OF_RANGE)
        found.append(DepthEfficiency(shallow, deep, *reached))
    return found


def loop_saturation_point(
    depths: Sequence[int],
    scores: Sequence[float],
    compute: Sequence[float],
    *,
    direction: str = "higher_is_better",
    definition: str = "max_dei",
    threshold: float = 0.0,
) -> LoopSaturation:
    """LSP: the depth where another loop stops paying.

    Args:
        definition: "max_dei", "threshold" or "baseline_argmax".
        threshold: quality per unit of compute, for the definition of that name.

    Raises:
        InvalidConfigError: as ``depth_efficiency_index``; a definition or threshold that is not allowed.
    """
    one_of("definition", definition, DEFINITIONS)
    not_negative("threshold", threshold)
    form = "baseline" if definition == "baseline_argmax" else "pairwise"
    pairs = depth_efficiency_index(depths, scores, compute, direction=direction, form=form)
    if not pairs:
        return LoopSaturation(None, definition, Undefined.FEWER_THAN_TWO_DEPTHS)
    defined = [(pair, pair.value) for pair in pairs if pair.value is not None]
    if not defined:
        return LoopSaturation(None, definition, pairs[0].undefined)
    if definition == "threshold":
        below = [pair.shallow for pair, value in defined if value < threshold]
        return LoopSaturation(below[0] if below else None, definition, None if below else Undefined.NOT_REACHED)
    best = max(value for _, value in defined)
    if best <= 0:
        return LoopSaturation(None, definition, Undefined.NO_DEPTH_HELPS)
    return LoopSaturation(next(pair.deep for pair, value in defined if math.isclose(value, best)), definition)


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


def depth_gain_ratio(
    depths: Sequence[int],
    scores: Sequence[float],
    *,
    direction: str = "higher_is_better",
    shallow: int | None = None,
    deep: int | None = None,
) -> DepthGain:
    """DGR: the gain from a shallow to a deep depth as a part of the shallow score.

    Args:
        shallow: a depth of the grid; None takes the shallowest.
        deep: a depth of the grid; None takes the deepest.

    Raises:
        InvalidConfigError: an unknown direction, a depth that was not measured, ``deep`` not above ``shallow``, or
            numbers that ``depth_table`` refuses.
    """
    one_of("direction", direction, DIRECTIONS)
    table = depth_table(depths, scores, None)
    for name, depth in (("shallow", shallow), ("deep", deep)):
        if depth is not None and depth not in table:
            raise InvalidConfigError(f"{name}={depth!r}: must be one of the depths {', '.join(map(str, table))}")
    if len(table) < 2:
        return DepthGain(None, None, None, Undefined.FEWER_THAN_TWO_DEPTHS)
    low = min(table) if shallow is None else shallow
    high = max(table) if deep is None else deep
    if high <= low:
        raise InvalidConfigError(f"deep={high}: must be deeper than shallow={low}")
    base = table[low][0]
    if base == 0:
        return DepthGain(low, high, None, Undefined.ZERO_BASELINE)
    value = gain(base, table[high][0], direction) / abs(base)
    return DepthGain(low, high, *((value, None) if math.isfinite(value) else (None, Undefined.OUT_OF_RANGE)))
