"""From result rows to what a report says: one study per curve over depth, all from the rows and nothing else.

Rows of one model, data set, metric and seed at fixed depths make a curve. Its depth metrics come from
``cognexis.eval_harness.metrics``. With the scores of single examples there are confidence intervals too. A row of an
adaptive mode is compared with the fixed curve at the same compute, by linear interpolation between the two
neighbouring depths, and is not compared outside the measured range.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import stdev
from typing import Any

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.depth_results import (
    DepthOptions,
    dei_results,
    dgr_results,
    lsp_results,
    ot_results,
)
from cognexis.eval_harness.result_tables import curves, depth_summary
from cognexis.eval_harness.results import ResultRow

# A difference below this part of the range of a curve neither helps nor harms.
NEGLIGIBLE = 1e-3
_SURE = 1.96  # standard errors
# What a depth costs stands in columns of every row; rows that repeat it are no curves of quality.
COSTS = frozenset(
    (
        *("latency_ms", "prefill_latency_ms", "decode_latency_ms_per_token", "flops", "peak_memory_bytes"),
        *("loops_mean", "loops_p50", "loops_p90", "loops_p99", "budget_exhaustion_rate"),
    )
)
# Identity of a row, then the score of each of its examples, in the same order at every depth.
Samples = dict[tuple[Any, ...], list[float]]
# Identity of a row, then pairs of a prompt and what the model made of it, with the same prompts at every depth.
Continuations = dict[tuple[Any, ...], list[tuple[str, str]]]


@dataclass(frozen=True)
class AdaptivePoint:
    """An adaptive row beside the fixed curve at equal compute; ``advantage`` is positive where adaptive is better."""

    row: ResultRow
    fixed_value: float | None
    advantage: float | None


@dataclass(frozen=True)
class CurveStudy:
    """One curve: its rows by depth, its depth metrics, and the adaptive rows that belong to it."""

    rows: list[ResultRow]
    failed: list[ResultRow]
    depth_metrics: dict[str, Any]
    best_depth: int | None
    adaptive: list[AdaptivePoint] = field(default_factory=list)
    continuations: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    """By depth; empty where nothing was generated."""
    scores: dict[int, list[float]] = field(default_factory=dict)
    """By depth, the scores of the same single examples; empty where they are not known."""

    @property
    def first(self) -> ResultRow:
        """Any row, for what all have in common."""
        return (self.rows or self.failed)[0]

    @property
    def title(self) -> str:
        """Data set and metric in words."""
        return f"{self.first.dataset} ({self.first.split}): {self.first.metric_name.replace('_', ' ')}"

    @property
    def recommended_default(self) -> int | None:
        """Depth that pays most."""
        return (self.depth_metrics["lsp"] or {}).get("loop_saturation_point")

    @property
    def difference_errors(self) -> dict[int, float]:
        """By depth, the standard error of the mean difference to the shallowest; empty without single scores."""
        return {depth: self._difference_error(self.rows[0].loop_count, depth) for depth in self.scores}

    @property
    def harmful_beyond(self) -> int | None:
        """The overthinking threshold where what follows is worse by more than a negligible part, and than noise."""
        threshold: int | None = (self.depth_metrics["ot"] or {}).get("overthinking_threshold")
        if threshold is None:
            return None
        losses = self._losses()
        worst = max((depth for depth in losses if depth > threshold), key=lambda depth: losses[depth])
        return threshold if self._is_worse(worst, threshold) else None

    @property
    def recommended_cap(self) -> int | None:
        """Depth beyond which a scheduler should not go: before harm, else the first that is as good as the best.

        None where no depth differs from the best by more than noise.
        """
        if self.harmful_beyond is not None or self.best_depth is None:
            return self.harmful_beyond
        losses = self._losses()
        if len(losses) > 1 and not any(self._is_worse(depth, self.best_depth) for depth in losses):
            return None
        return min(depth for depth, loss in losses.items() if loss - losses[self.best_depth] <= self._negligible())

    def _is_worse(self, depth: int, other: int) -> bool:
        losses = self._losses()
        noise = _SURE * self._difference_error(depth, other) if self.scores else 0.0
        return losses[depth] - losses[other] > max(self._negligible(), noise)

    def _difference_error(self, depth: int, other: int) -> float:
        """Examples differ more from each other than depths do, so depths are compared example by example."""
        pairs = zip(self.scores[depth], self.scores[other], strict=True)
        differences = [one - another for one, another in pairs]
        return stdev(differences) / len(differences) ** 0.5

    def _losses(self) -> dict[int, float]:
        """The metric by depth, turned so that lower is better."""
        sign = -1 if self.first.metric_direction == "higher_is_better" else 1
        return {row.loop_count: sign * row.metric_value for row in self.rows if row.metric_value is not None}

    def _negligible(self) -> float:
        values = self._losses().values()
        return NEGLIGIBLE * (max(values) - min(values))


def study_curves(
    rows: Iterable[ResultRow],
    options: DepthOptions | None = None,
    samples: Samples | None = None,
    continuations: Continuations | None = None,
) -> list[CurveStudy]:
    """A study of every fixed curve, in the order of the rows.

    Args:
        options: of the depth metrics; the direction and unit come from the rows. Intervals need ``samples``.
        samples: scores of single examples.
        continuations: texts by row.

    Raises:
        InvalidConfigError: there is no row at a fixed depth.
    """
    given, texts = options or DepthOptions(), continuations or {}
    everything = [row for row in rows if row.metric_name not in COSTS]
    fixed = curves(row for row in everything if row.loop_mode == "fixed")
    if not fixed:
        raise InvalidConfigError("rows: none has loop_mode='fixed'; a study needs a grid of fixed depths")
    studies = []
    for curve in fixed:
        good = [row for row in curve if row.metric_value is not None]
        sign = 1 if curve[0].metric_direction == "higher_is_better" else -1
        best = max(good, key=lambda row: (sign * (row.metric_value or 0.0), -row.loop_count), default=None)
        studies.append(
            CurveStudy(
                rows=good,
                failed=[row for row in curve if row.metric_value is None],
                depth_metrics=_depth_metrics(good, given, samples),
                best_depth=None if best is None else best.loop_count,
                adaptive=[_beside(row, good, sign) for row in everything if _belongs(row, curve[0])],
                scores=_paired_scores(good, samples or {}),
                continuations={row.loop_count: texts[row.identity] for row in good if row.identity in texts},
            )
        )
    return studies


def _depth_metrics(rows: Sequence[ResultRow], options: DepthOptions, samples: Samples | None) -> dict[str, Any]:
    scores = [(samples or {}).get(row.identity) for row in rows]
    if options.confidence_level is None or not rows or any(score is None for score in scores):
        plain = DepthOptions(**{**vars(options), "confidence_level": None})
        return depth_summary(rows, plain)
    depths = [row.loop_count for row, score in zip(rows, scores, strict=True) for _ in score or ()]
    costs = [row.flops_mean or 0.0 for row, score in zip(rows, scores, strict=True) for _ in score or ()]
    values = [value for score in scores for value in score or ()]
    chosen = DepthOptions(
        **{**vars(options), "direction": rows[0].metric_direction, "compute_unit": rows[0].compute_unit}
    )
    functions = {"dei": dei_results, "lsp": lsp_results, "ot": ot_results, "dgr": dgr_results}
    return {name: function(depths, values, costs, chosen) for name, function in functions.items()}


def _paired_scores(rows: Sequence[ResultRow], samples: Samples) -> dict[int, list[float]]:
    """Scores by depth; empty unless every depth has those of the same number of examples, two or more."""
    scores = {row.loop_count: samples.get(row.identity, []) for row in rows}
    counts = {*map(len, scores.values())}
    return scores if len(counts) == 1 and min(counts) >= 2 else {}


def _belongs(row: ResultRow, fixed: ResultRow) -> bool:
    names = ("checkpoint", "dataset", "split", "task_version", "prompt_format", "metric_name", "dtype", "seed")
    return row.loop_mode != "fixed" and all(getattr(row, name) == getattr(fixed, name) for name in names)


def _beside(row: ResultRow, curve: Sequence[ResultRow], sign: int) -> AdaptivePoint:
    value = value_at_compute(curve, row.flops_mean)
    if value is None or row.metric_value is None:
        return AdaptivePoint(row, value, None)
    return AdaptivePoint(row, value, sign * (row.metric_value - value))


def value_at_compute(curve: Sequence[ResultRow], flops: float | None) -> float | None:
    """The metric of a fixed curve at a compute, between two depths; None outside the measured range."""
    points = sorted(
        (row.flops_mean, row.metric_value)
        for row in curve
        if row.flops_mean is not None and row.metric_value is not None
    )
    if flops is None or len(points) < 2:
        return None
    for (low, value), (high, next_value) in pairwise(points):
        if low <= flops <= high:
            part = (flops - low) / (high - low) if high > low else 0.0
            return value + part * (next_value - value)
    return None
