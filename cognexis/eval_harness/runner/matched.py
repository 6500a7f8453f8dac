"""Adaptive runs beside fixed ones of the same mean depth.

An adaptive row with a mean of m loops is paired with the fixed row of the nearest depth, and with the value of the
fixed curve at m itself, linear between the two neighbouring depths. ``advantage`` is what the adaptive run is better
by than the curve at m, positive where it is better, whatever the direction of the metric. Source: the rows alone.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from cognexis.eval_harness.results import ResultRow

ADAPTIVE_KEY = "loops"
"""What the decoding settings of an adaptive row hold more than those of its fixed partner."""
_SHARED = ("checkpoint", "tokenizer_checksum", "dataset", "split", "task_version", "prompt_format", "dtype", "seed")


def nearest_depth(mean_loops: float) -> int:
    """The depth to compare with; a half is rounded up."""
    return max(1, int(mean_loops + 0.5))


def matched_pairs(rows: Iterable[ResultRow]) -> list[dict[str, Any]]:
    """One record for every completed adaptive row, in their order; its fixed side is None where that is missing."""
    everything = [row for row in rows if row.status == "completed"]
    return [_pair(row, _partners(row, everything)) for row in everything if row.loop_mode != "fixed"]


def _partners(row: ResultRow, rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Fixed rows of the same measurement, by depth."""

    def key(other: ResultRow) -> tuple[Any, ...]:
        decoding = {name: value for name, value in other.decoding.items() if name != ADAPTIVE_KEY}
        return (*(getattr(other, name) for name in _SHARED), repr(sorted(decoding.items())), other.metric_name)

    found = [other for other in rows if other.loop_mode == "fixed" and key(other) == key(row)]
    return sorted(found, key=lambda other: other.loop_count)


def _pair(row: ResultRow, fixed: Sequence[ResultRow]) -> dict[str, Any]:
    diagnostics = row.scheduler_diagnostics
    mean = None if diagnostics is None else diagnostics.average_loops_used
    partner = None if mean is None else next((x for x in fixed if x.loop_count == nearest_depth(mean)), None)
    at_mean = None if mean is None else _interpolated(fixed, mean)
    sign = 1 if row.metric_direction == "higher_is_better" else -1
    known = row.metric_value is not None and at_mean is not None
    return {
        "dataset": row.dataset,
        "split": row.split,
        "metric_name": row.metric_name,
        "metric_direction": row.metric_direction,
        "loop_mode": row.loop_mode,
        "mean_loops": mean,
        "adaptive_value": row.metric_value,
        "adaptive_flops": row.flops_mean,
        "fixed_loop_count": None if partner is None else partner.loop_count,
        "fixed_value": None if partner is None else partner.metric_value,
        "fixed_flops": None if partner is None else partner.flops_mean,
        "fixed_value_at_mean_loops": at_mean,
        "advantage": sign * ((row.metric_value or 0.0) - (at_mean or 0.0)) if known else None,
        "compute_unit": row.compute_unit,
    }


def _interpolated(fixed: Sequence[ResultRow], loops: float) -> float | None:
    """Value of the curve at a number of loops; None outside the measured depths."""
    points = [(row.loop_count, row.metric_value) for row in fixed if row.metric_value is not None]
    for depth, value in points:
        if depth == loops:
            return value
    for (low, value), (high, next_value) in pairwise(points):
        if low < loops < high:
            return value + (loops - low) / (high - low) * (next_value - value)
    return None
