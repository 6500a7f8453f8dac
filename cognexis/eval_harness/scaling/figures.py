"""Figures of a study as PNG bytes, and what their axes have in common; the same rows give the same bytes."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from cognexis.eval_harness.metrics.optional_package import needed_package
from cognexis.eval_harness.results import ResultRow
from cognexis.eval_harness.scaling.study import CurveStudy

_WIDTH, _HEIGHT, _DPI = 6.4, 4.0, 110
_NEEDED_BY = "A loop-scaling report"
_SCALES = ((1e12, "trillion "), (1e9, "billion "), (1e6, "million "), (1e3, "thousand "))


def require_figures() -> None:
    """Make sure that figures can be drawn.

    Raises:
        BackendError: matplotlib is not installed.
    """
    needed_package("matplotlib.figure", "matplotlib", _NEEDED_BY)


def compute_unit(rows: Sequence[ResultRow]) -> tuple[float, str]:
    """A divisor that makes the compute of ``rows`` easy to read, and its unit in words."""
    largest = max((row.flops_mean or 0.0 for row in rows), default=0.0)
    scale, word = next(((scale, word) for scale, word in _SCALES if largest >= scale), (1.0, ""))
    return scale, word + rows[0].compute_unit.replace("_", " ").replace("flops", "FLOPs")


def picture(draw: Callable[[Any], None], title: str, x_label: str, y_label: str) -> bytes:
    """One panel, drawn by ``draw`` on its axes."""
    figure, panels = new_panels(1)
    draw(panels[0])
    panels[0].set(xlabel=x_label, ylabel=y_label, title=title)
    return png(figure, panels)


def new_panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels, two beside each other."""
    figure = needed_package("matplotlib.figure", "matplotlib", _NEEDED_BY).Figure(dpi=_DPI, layout="constrained")
    columns = min(count, 2)
    lines = -(-count // columns)
    figure.set_size_inches(_WIDTH * (1 if columns == 1 else 1.6), _HEIGHT * (1 if lines == 1 else 0.9 * lines))
    return figure, [figure.add_subplot(lines, columns, place + 1) for place in range(count)]


def png(figure: Any, panels: Sequence[Any]) -> bytes:
    """The figure, with a grid and a legend in each panel that has labels."""
    for axes in panels:
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        if unique:
            axes.legend(unique.values(), unique, fontsize=8)
    canvas = needed_package("matplotlib.backends.backend_agg", "matplotlib", _NEEDED_BY).FigureCanvasAgg
    stream = io.BytesIO()
    canvas(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def depth_axis(axes: Any, studies: Sequence[CurveStudy]) -> None:
    """Depths on a logarithmic axis with a tick at each, and a shade beyond the depth of training."""
    depths = sorted({row.loop_count for study in studies for row in study.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    shade_beyond_training(axes, [row for study in studies for row in study.rows])


def round_ticks(limits: tuple[float, float]) -> list[float]:
    """Round numbers within ``limits`` for a logarithmic axis: 1, 2, 5 times powers of ten, or more where few fit."""
    ticks: list[float] = []
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        every = [digit * 10.0**power for power in range(-15, 19) for digit in digits]
        ticks = [tick for tick in every if limits[0] <= tick <= limits[1]]
        if len(ticks) >= 3:
            break
    return ticks


def shade_beyond_training(axes: Any, rows: Sequence[ResultRow]) -> None:
    """A shade over the loops beyond the depth of training, where they are known and shown."""
    trained = max((row.trained_max_loops or 0 for row in rows), default=0)
    last = max((row.loop_count for row in rows), default=0)
    if not 0 < trained < last:
        return
    right = axes.get_xlim()[1]
    axes.axvspan(trained * 1.02, right, color="0.5", alpha=0.12, lw=0, label=f"beyond training ({trained} loops)")
    axes.set_xlim(right=right)


def by_depth(
    axes: Any, rows: Sequence[ResultRow], values: Sequence[float | None], *, color: str, label: str, style: str = "-"
) -> None:
    """Values at the depths of ``rows``, hollow beyond training; those that do not exist are left out."""
    shown = [(row.loop_count, value, row.extrapolated) for row, value in zip(rows, values, strict=True)]
    shown = [(depth, value, beyond) for depth, value, beyond in shown if value is not None]
    if not shown:
        return
    axes.plot([d for d, _, _ in shown], [v for _, v, _ in shown], f"o{style}", ms=5, color=color, label=label)
    hollow = [(depth, value) for depth, value, beyond in shown if beyond]
    if hollow:
        axes.plot(*zip(*hollow, strict=True), "o", ms=5, mfc="white", color=color, zorder=3)
