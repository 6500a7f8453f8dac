"""The pictures of a study as PNG bytes; the same rows give the same bytes.

Bars are 95 % intervals: 1.96 standard errors of a row, or bootstrap intervals of the depth efficiency. Hollow points
lie beyond the depth of training. Dashed lines mark the saturation point, dotted ones the overthinking threshold.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

from cognexis.eval_harness.metrics.optional_package import needed_package
from cognexis.eval_harness.scaling.study import CurveStudy

_WIDTH, _HEIGHT, _DPI = 6.4, 4.0, 110
_UNITS = {
    "negative_log_likelihood": "nats per token",
    "perplexity": "",
    "accuracy": "share of examples",
    "exact_match": "share of examples",
    "pass_at_k": "share of problems",
}


def quality_by_loops(studies: Sequence[CurveStudy]) -> bytes:
    """The metric against the number of loops; one line per seed, adaptive rows as stars at their mean depth."""

    def draw(axes: Any) -> None:
        for index, study in enumerate(studies):
            depths = [row.loop_count for row in study.rows]
            _curve(axes, study, depths, index)
            for point in study.adaptive:
                diagnostics = point.row.scheduler_diagnostics
                if diagnostics is not None and point.row.metric_value is not None:
                    axes.plot(diagnostics.average_loops_used, point.row.metric_value, **_star(index))
        _depth_axis(axes, studies)
        _marks(axes, studies)

    return _picture(draw, studies[0].title, "loops", _quality_label(studies))


def quality_by_compute(studies: Sequence[CurveStudy]) -> bytes:
    """The metric against the compute, each point with its depth."""

    def draw(axes: Any) -> None:
        for index, study in enumerate(studies):
            costs = [row.flops_mean for row in study.rows if row.flops_mean is not None]
            if len(costs) == len(study.rows):
                _curve(axes, study, costs, index)
                for row, cost in zip(study.rows, costs, strict=True) if index == 0 else ():
                    where = (cost, row.metric_value)
                    axes.annotate(str(row.loop_count), where, xytext=(4, 6), textcoords="offset points", fontsize=8)
            for point in study.adaptive:
                if point.row.flops_mean is not None and point.row.metric_value is not None:
                    axes.plot(point.row.flops_mean, point.row.metric_value, **_star(index))

    unit = studies[0].first.compute_unit.replace("_", " ").replace("flops", "FLOPs")
    return _picture(draw, f"{studies[0].title}\nnumbers at the points are loops", unit, _quality_label(studies))


def efficiency_by_depth(studies: Sequence[CurveStudy]) -> bytes:
    """The depth efficiency index of each step, as bars; with intervals where single examples are known."""

    def draw(axes: Any) -> None:
        width = 0.8 / len(studies)
        names: list[str] = []
        for index, study in enumerate(studies):
            dei = study.depth_metrics["dei"]
            if dei is None:
                continue
            pairs = [f"{low}→{high}" for low, high in dei["depth_efficiency_index_depths"]]
            names = pairs if len(pairs) > len(names) else names
            places = [place + index * width for place in range(len(pairs))]
            values = dei["depth_efficiency_index"]
            bars = dei.get("depth_efficiency_index_confidence_interval")
            shown = [(x, y, bar) for x, y, bar in zip(places, values, bars or [None] * len(values), strict=True)]
            shown = [(x, y, bar) for x, y, bar in shown if y is not None]
            errors = [[y - bar[0] for _, y, bar in shown], [bar[1] - y for _, y, bar in shown]] if bars else None
            xs, ys = [x for x, _, _ in shown], [y for _, y, _ in shown]
            errors = [[max(part, 0.0) for part in side] for side in errors] if errors else None
            axes.bar(xs, ys, width, yerr=errors, capsize=3, color=f"C{index}", label=_seed(study))
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks([place + width * (len(studies) - 1) / 2 for place in range(len(names))], names)

    unit = studies[0].first.compute_unit.replace("_", " ").replace("flops", "FLOPs")
    label = f"gain in {studies[0].first.metric_name.replace('_', ' ')}\nper {unit}"
    return _picture(draw, f"Depth efficiency, {studies[0].title}", "step in depth (loops)", label)


def state_by_loop(studies: Sequence[CurveStudy]) -> bytes:
    """Norm of the state, and its relative change, after every loop of the deepest run of each data set."""
    figure, (norms, deltas) = _two_panels()
    for index, row in enumerate(_deepest(studies)):
        if row.hidden_norms is not None:
            norms.plot(
                range(len(row.hidden_norms)), row.hidden_norms, "o-", ms=4, color=f"C{index}", label=row.dataset
            )
        if row.hidden_deltas is not None:
            places = range(1, len(row.hidden_deltas) + 1)
            deltas.plot(places, row.hidden_deltas, "o-", ms=4, color=f"C{index}", label=row.dataset)
    norms.set(xlabel="loop (0: before the first)", ylabel="mean norm of the state", title="Norm of the state")
    deltas.set(xlabel="loop", ylabel="|h_t - h_(t-1)| / |h_(t-1)|", title="Relative change of the state")
    return _png(figure, (norms, deltas))


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
            axes.plot(depths, [row.latency_ms_mean for row in timed], "o-", color=color, label=f"{name}, mean")
            for percentile, style in (("p50", "--"), ("p90", "-."), ("p99", ":")):
                values = [getattr(row, f"latency_ms_{percentile}") for row in timed]
                if all(value is not None for value in values):
                    axes.plot(depths, values, style, color=color, lw=1, label=f"{name}, {percentile}")
        _depth_axis(axes, studies)
        axes.set_ylim(bottom=0)

    return _picture(draw, f"Latency on {studies[0].first.hardware}", "loops", "milliseconds per forward pass")


def _curve(axes: Any, study: CurveStudy, places: Sequence[float], index: int) -> None:
    values = [row.metric_value for row in study.rows]
    errors = [1.96 * (row.standard_error or 0.0) for row in study.rows]
    axes.errorbar(places, values, yerr=errors, fmt="o-", ms=5, capsize=3, color=f"C{index}", label=_seed(study))
    beyond = [(x, row.metric_value) for x, row in zip(places, study.rows, strict=True) if row.extrapolated]
    if beyond:
        axes.plot(
            *zip(*beyond, strict=True), "o", ms=5, mfc="white", color=f"C{index}", zorder=3, label="beyond training"
        )


def _star(index: int) -> dict[str, Any]:
    return {"marker": "*", "ms": 13, "mec": "black", "ls": "", "color": f"C{index}", "zorder": 4, "label": "adaptive"}


def _marks(axes: Any, studies: Sequence[CurveStudy]) -> None:
    for index, study in enumerate(studies):
        if study.recommended_default is not None:
            depth = study.recommended_default
            axes.axvline(depth, ls="--", lw=1, color=f"C{index}", label=f"saturation point {depth}")
        threshold = (study.depth_metrics["ot"] or {}).get("overthinking_threshold")
        if threshold is not None:
            axes.axvline(threshold, ls=":", lw=1.5, color=f"C{index}", label=f"overthinking threshold {threshold}")


def _depth_axis(axes: Any, studies: Sequence[CurveStudy]) -> None:
    depths = sorted({row.loop_count for study in studies for row in study.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()


def _seed(study: CurveStudy) -> str:
    return f"seed {study.first.seed}"


def _quality_label(studies: Sequence[CurveStudy]) -> str:
    first = studies[0].first
    unit = _UNITS.get(first.metric_name, "")
    better = "higher" if first.metric_direction == "higher_is_better" else "lower"
    return f"{first.metric_name.replace('_', ' ')}\n({f'{unit}, ' if unit else ''}{better} is better)"


def _deepest(studies: Sequence[CurveStudy]) -> list[Any]:
    rows: dict[str, Any] = {}
    for study in studies:
        for row in study.rows:
            known = rows.get(row.dataset)
            if row.hidden_norms is not None and (known is None or row.loop_count > known.loop_count):
                rows[row.dataset] = row
    return list(rows.values())


def _figure() -> Any:
    figure = needed_package("matplotlib.figure", "matplotlib", "A loop-scaling report").Figure
    return figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")


def _two_panels() -> tuple[Any, Any]:
    figure = _figure()
    figure.set_size_inches(1.5 * _WIDTH, _HEIGHT)
    return figure, figure.subplots(1, 2)


def _picture(draw: Callable[[Any], None], title: str, x_label: str, y_label: str) -> bytes:
    figure = _figure()
    axes = figure.subplots()
    draw(axes)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    return _png(figure, (axes,))


def _png(figure: Any, panels: Sequence[Any]) -> bytes:
    for axes in panels:
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        if unique:
            axes.legend(unique.values(), unique, fontsize=8)
    canvas = needed_package("matplotlib.backends.backend_agg", "matplotlib", "A loop-scaling report").FigureCanvasAgg
    stream = io.BytesIO()
    canvas(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()
