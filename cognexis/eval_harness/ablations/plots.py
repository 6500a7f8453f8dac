"""The pictures of an ablation report as PNG bytes, from the data of ``plot_data``; equal data give equal bytes."""

import io
from typing import Any

from cognexis.eval_harness.metrics.optional_package import needed_package

_DPI = 110
_WORDS = {
    "negative_log_likelihood": "held-out loss\n(nats per token, lower is better)",
    "accuracy": "accuracy of the next token\n(share, higher is better)",
}
_AXES = {"latency_ms": "latency (ms per batch)", "state_norm": "norm of the last state", "loops": "mean loops"}


def difference_picture(data: dict[str, Any]) -> bytes:
    """A bar for each experiment."""
    names = data["experiments"]
    figure = _figure(7.0, 1.4 + 0.34 * max(len(names), 1))
    axes = figure.subplots()
    colors = ["C3" if value < 0 else "C2" for value in data["metric_delta"]]
    unit = "nats per token" if data["metric"] == "negative_log_likelihood" else "accuracy"
    bars = data["interval"] if any(data["interval"]) else None
    axes.barh(range(len(names)), data["metric_delta"], xerr=bars, color=colors, capsize=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    axes.set(
        xlabel=f"difference from the baseline in {unit} (left: worse without the part){_left_out(data)}",
        title="What each part is worth",
    )
    return _png(figure)


def depth_picture(data: dict[str, Any]) -> bytes:
    """Loss against the number of loops, a line for each trained experiment."""
    figure = _figure(7.0, 4.4)
    axes = figure.subplots()
    ticks: set[int] = set()
    for index, (name, curve) in enumerate(data["curves"].items()):
        style = {"lw": 2.5, "color": "black"} if index == 0 else {"lw": 1.2, "color": f"C{(index - 1) % 10}"}
        marker = "o" if index <= 10 else "s"
        axes.plot(curve["loops"], curve["negative_log_likelihood"], marker=marker, ms=4, label=name, **style)
        ticks |= set(curve["loops"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.set(xlabel="loops", ylabel=_WORDS["negative_log_likelihood"], title="Loss by depth")
    _legend_outside(axes)
    return _png(figure)


def pareto_picture(data: dict[str, Any]) -> bytes:
    """Metric against compute; dots and squares on the front, which is joined by a line, crosses behind it."""
    figure = _figure(8.0, 4.4)
    axes = figure.subplots()
    front = sorted((point["flops_per_token"] / 1e6, point["metric"]) for point in data["points"] if point["on_front"])
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="black", lw=1, label="Pareto front")
    for index, point in enumerate(data["points"]):
        marker = ("o" if index <= 10 else "s") if point["on_front"] else ("x" if index <= 10 else "+")
        color = "black" if index == 0 else f"C{(index - 1) % 10}"
        place = (point["flops_per_token"] / 1e6, point["metric"])
        axes.plot(*place, marker, color=color, ms=7, label=point["experiment"])
    axes.set(xlabel=f"MFLOPs per token{_left_out(data)}", ylabel=_WORDS[data["metric"]], title="Quality and compute")
    _legend_outside(axes)
    return _png(figure)


def sweep_picture(data: dict[str, Any]) -> bytes:
    """Metric, latency, norm of the state and loops against the value."""
    shown = [name for name in ("metric", *_AXES) if any(value is not None for value in data[name])] or ["metric"]
    figure = _figure(3.6 * len(shown), 3.4)
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        places = [index for index, value in enumerate(data[name]) if value is not None]
        values = [data[name][index] for index in places]
        bars = [data["metric_interval"][index] for index in places] if name == "metric" else None
        axes.errorbar(places, values, yerr=bars, fmt="o-", ms=5, capsize=3)
        labels = [_tick(value, status) for value, status in zip(data["values"], data["statuses"], strict=True)]
        axes.set_xticks(range(len(labels)), labels)
        axes.set(
            xlabel=data["sweep"].replace("_", " "),
            ylabel=_WORDS[data["metric_name"]] if name == "metric" else _AXES[name],
        )
    return _png(figure)


def _left_out(data: dict[str, Any]) -> str:
    """What has no point, in a line below the label of the axis."""
    missing = [f"{name} ({reason})" for name, reason in data["without_value"].items()]
    return "\nnot shown: " + ", ".join(missing) if missing else ""


def _legend_outside(axes: Any) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _tick(value: Any, status: str) -> str:
    text = "none" if value is None else str(value)
    return text if status == "completed" else f"{text}\n({status})"


def _figure(width: float, height: float) -> Any:
    figure = needed_package("matplotlib.figure", "matplotlib", "An ablation report").Figure
    return figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: Any) -> bytes:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    canvas = needed_package("matplotlib.backends.backend_agg", "matplotlib", "An ablation report").FigureCanvasAgg
    stream = io.BytesIO()
    canvas(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()
