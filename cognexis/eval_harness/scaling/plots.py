"""Pictures of quality, compute and time over depth.

Bars are 95 % intervals: of the difference to the shallowest depth where single examples are known, else of the row;
and bootstrap intervals of the depth efficiency. Hollow points, hatched bars and shades lie beyond the depth of
training. Dashed lines mark the saturation point, dotted ones the overthinking threshold.
"""

from collections.abc import Sequence
from typing import Any

from cognexis.eval_harness.scaling.figures import by_depth, compute_unit, depth_axis, picture, round_ticks
from cognexis.eval_harness.scaling.overthinking import loops
from cognexis.eval_harness.scaling.study import CurveStudy

_ABOVE: dict[str, Any] = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8}
_UNITS = {
    "negative_log_likelihood": "nats per token",
    "perplexity": "",
    "accuracy": "share",
    "exact_match": "share of examples",
    "pass_at_k": "share of problems",
}


def quality_by_loops(studies: Sequence[CurveStudy]) -> bytes:
    """The metric against the number of loops; one line per seed, adaptive rows as stars at their mean depth."""

    def draw(axes: Any) -> None:
        for index, study in enumerate(studies):
            depths = [row.loop_count for row in study.rows]
            _curve(axes, study, depths, index, beyond="")
            for point in study.adaptive:
                diagnostics = point.row.scheduler_diagnostics
                if diagnostics is not None and point.row.metric_value is not None:
                    axes.plot(diagnostics.average_loops_used, point.row.metric_value, **_star(index))
        depth_axis(axes, studies)
        _marks(axes, studies)

    return picture(draw, studies[0].title, "loops", _quality_label(studies))


def quality_by_compute(studies: Sequence[CurveStudy]) -> bytes:
    """The metric against the compute, each point with its depth."""
    scale, unit = _unit(studies)

    def draw(axes: Any) -> None:
        for index, study in enumerate(studies):
            costs = [row.flops_mean / scale for row in study.rows if row.flops_mean is not None]
            if len(costs) == len(study.rows):
                _curve(axes, study, costs, index, beyond="beyond training")
                for row, cost in zip(study.rows, costs, strict=True) if index == 0 else ():
                    where = (cost, row.metric_value)
                    axes.annotate(str(row.loop_count), where, **_ABOVE)
            for point in study.adaptive:
                if point.row.flops_mean is not None and point.row.metric_value is not None:
                    axes.plot(point.row.flops_mean / scale, point.row.metric_value, **_star(index))
        axes.set_xscale("log")
        axes.margins(x=0.08, y=0.12)
        axes.set_xticks(ticks := round_ticks(axes.get_xlim()), [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()

    return picture(draw, f"{studies[0].title}\nnumbers at the points are loops", unit, _quality_label(studies))


def efficiency_by_depth(studies: Sequence[CurveStudy]) -> bytes:
    """The depth efficiency index of each step, as bars; with intervals where single examples are known."""
    scale, unit = _unit(studies)

    def draw(axes: Any) -> None:
        width = 0.8 / len(studies)
        names: list[str] = []
        for index, study in enumerate(studies):
            dei = study.depth_metrics["dei"]
            if dei is None:
                continue
            pairs = dei["depth_efficiency_index_depths"]
            names = [f"{low}→{high}" for low, high in pairs] if len(pairs) > len(names) else names
            bars = dei.get("depth_efficiency_index_confidence_interval") or [None] * len(pairs)
            beyond = {row.loop_count for row in study.rows if row.extrapolated}
            for place, (pair, value, bar) in enumerate(zip(pairs, dei["depth_efficiency_index"], bars, strict=True)):
                if value is not None:
                    _bar(
                        axes,
                        place + index * width,
                        width,
                        value * scale,
                        bar and [end * scale for end in bar],
                        color=f"C{index}",
                        label=_seed(study),
                        is_beyond=pair[1] in beyond,
                    )
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks([place + width * (len(studies) - 1) / 2 for place in range(len(names))], names)

    label = f"gain in {studies[0].first.metric_name.replace('_', ' ')}\nper {unit}"
    return picture(draw, f"Depth efficiency, {studies[0].title}", "step in depth (loops)", label)


def _bar(
    axes: Any,
    place: float,
    width: float,
    value: float,
    interval: Sequence[float] | None,
    *,
    color: str,
    label: str,
    is_beyond: bool,
) -> None:
    errors = None
    if interval is not None:
        errors = [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]]
    look = {"hatch": "///", "alpha": 0.5, "label": f"{label}, beyond training"} if is_beyond else {"label": label}
    axes.bar([place], [value], width, yerr=errors, capsize=3, color=color, **look)


def latency_by_loops(studies: Sequence[CurveStudy]) -> bytes:
    """Mean and percentiles of the latency against the number of loops, by data set."""

    def draw(axes: Any) -> None:
        seen: set[str] = set()
        for study in studies:
            timed = [row for row in study.rows if row.latency_ms_mean is not None]
            if not timed or study.first.dataset in seen:
                continue
            color, depths = f"C{len(seen)}", [row.loop_count for row in timed]
            seen.add(study.first.dataset)
            name = study.first.dataset
            by_depth(axes, timed, [row.latency_ms_mean for row in timed], color=color, label=f"{name}, mean")
            for percentile, style in (("p50", "--"), ("p90", "-."), ("p99", ":")):
                values = [getattr(row, f"latency_ms_{percentile}") for row in timed]
                if all(value is not None for value in values):
                    axes.plot(depths, values, style, color=color, lw=1, label=f"{name}, {percentile}")
        depth_axis(axes, studies)
        axes.set_yscale("log")
        axes.set_yticks(ticks := round_ticks(axes.get_ylim()), [f"{tick:,g}" for tick in ticks])
        axes.minorticks_off()

    first = studies[0].first
    batch = "" if first.batch_size is None else f" of up to {first.batch_size} rows"
    return picture(draw, f"Latency on {first.hardware}", "loops", f"milliseconds per forward pass\n{batch}".strip())


def _curve(axes: Any, study: CurveStudy, places: Sequence[float], index: int, *, beyond: str) -> None:
    values = [row.metric_value for row in study.rows]
    name = _seed(study)
    if study.difference_errors:
        errors = [1.96 * study.difference_errors[row.loop_count] for row in study.rows]
        name += f"\n95 % interval of the difference to {loops(study.rows[0].loop_count)}"
    else:
        errors = [1.96 * (row.standard_error or 0.0) for row in study.rows]
        name += "\n95 % of the value" if any(errors) else ""
    axes.errorbar(places, values, yerr=errors, fmt="o-", ms=5, capsize=3, color=f"C{index}", label=name)
    hollow = [(x, row.metric_value) for x, row in zip(places, study.rows, strict=True) if row.extrapolated]
    if hollow:
        look = {"ms": 5, "mfc": "white", "color": f"C{index}", "zorder": 3}
        axes.plot(*zip(*hollow, strict=True), "o", **look, label=beyond)


def _star(index: int) -> dict[str, Any]:
    return {"marker": "*", "ms": 13, "mec": "black", "ls": "", "color": f"C{index}", "zorder": 4, "label": "adaptive"}


def _marks(axes: Any, studies: Sequence[CurveStudy]) -> None:
    for index, study in enumerate(studies):
        if study.recommended_default is not None:
            depth = study.recommended_default
            axes.axvline(depth, ls="--", lw=1, color=f"C{index}", label=f"saturation point {depth}")
        if study.harmful_beyond is not None:
            label = f"overthinking threshold {study.harmful_beyond}"
            axes.axvline(study.harmful_beyond, ls=":", lw=1.5, color=f"C{index}", label=label)


def _seed(study: CurveStudy) -> str:
    return f"seed {study.first.seed}"


def _unit(studies: Sequence[CurveStudy]) -> tuple[float, str]:
    return compute_unit([row for study in studies for row in study.rows])


def _quality_label(studies: Sequence[CurveStudy]) -> str:
    first = studies[0].first
    unit = _UNITS.get(first.metric_name, "")
    better = "higher" if first.metric_direction == "higher_is_better" else "lower"
    return f"{first.metric_name.replace('_', ' ')}\n({f'{unit}, ' if unit else ''}{better} is better)"
