"""Pictures of what happens inside a model that loops: its state, its predictions, its attention, its texts."""

from collections.abc import Sequence
from typing import Any

from cognexis.eval_harness.results import ResultRow
from cognexis.eval_harness.scaling.figures import by_depth, depth_axis, new_panels, png, shade_beyond_training
from cognexis.eval_harness.scaling.overthinking import change_ratio, leading_studies
from cognexis.eval_harness.scaling.study import CurveStudy

_SIGNS = ("prediction_entropy", "attention_entropies", "loop_gain", "repetition_rate")


def has_signs(rows: Sequence[ResultRow]) -> bool:
    """Whether there is something for ``signs_by_depth`` to show."""
    return any(getattr(row, name) is not None for row in rows for name in _SIGNS)


def state_by_loop(studies: Sequence[CurveStudy]) -> bytes:
    """Norm of the state, and its relative change, after every loop of the deepest run of each data set."""
    figure, (norms, deltas) = new_panels(2)
    rows = _deepest(studies, "hidden_norms")
    for index, row in enumerate(rows):
        look: dict[str, Any] = {"color": f"C{index}", "label": row.dataset, "ms": 3}
        norms.plot(range(len(row.hidden_norms or ())), row.hidden_norms, "o-", **look)
        if row.hidden_deltas is not None:
            deltas.plot(range(1, len(row.hidden_deltas) + 1), row.hidden_deltas, "o-", **look)
    for axes in (norms, deltas):
        shade_beyond_training(axes, rows)
    norms.set(xlabel="loop (0: before the first)", ylabel="mean norm of the state", title="Norm of the state")
    norms.set_ylim(0, 1.35 * max(norm or 0.0 for row in rows for norm in row.hidden_norms or ()))
    deltas.set(xlabel="loop t", ylabel="|h_t - h_(t-1)| / |h_(t-1)|", title="Relative change of the state")
    if any(value for row in rows for value in row.hidden_deltas or ()):
        deltas.set_yscale("log")
    return png(figure, (norms, deltas))


def signs_by_depth(studies: Sequence[CurveStudy]) -> bytes:
    """Entropy of the predictions and of the attention, gain of a loop, and repetition, as far as measured."""
    leading = leading_studies(studies)
    rows = [row for study in leading for row in study.rows]
    drawings = {
        "prediction_entropy": _draw_entropy,
        "attention_entropies": _draw_attention,
        "loop_gain": _draw_gain,
        "repetition_rate": _draw_repetition,
    }
    wanted = [draw for name, draw in drawings.items() if any(getattr(row, name) is not None for row in rows)]
    figure, panels = new_panels(len(wanted))
    for axes, draw in zip(panels, wanted, strict=True):
        draw(axes, leading)
    return png(figure, panels)


def _draw_entropy(axes: Any, studies: Sequence[CurveStudy]) -> None:
    for index, study in enumerate(studies):
        values = [row.prediction_entropy for row in study.rows]
        by_depth(axes, study.rows, values, color=f"C{index}", label=_name(study, studies))
    depth_axis(axes, studies)
    _thresholds(axes, studies)
    axes.set(xlabel="loops", ylabel="nats", title="Entropy of the predictions")


def _draw_attention(axes: Any, studies: Sequence[CurveStudy]) -> None:
    rows = _deepest(studies, "attention_entropies")
    for index, row in enumerate(rows):
        places = range(1, len(row.attention_entropies or ()) + 1)
        axes.plot(places, row.attention_entropies, "o-", ms=3, color=f"C{index}", label=row.dataset)
    shade_beyond_training(axes, rows)
    axes.set(xlabel="loop", ylabel="nats", title="Entropy of the core's attention, deepest run")


def _draw_gain(axes: Any, studies: Sequence[CurveStudy]) -> None:
    for index, study in enumerate(studies):
        name, ratios = _name(study, studies), [change_ratio(row) for row in study.rows]
        by_depth(axes, study.rows, [row.loop_gain for row in study.rows], color=f"C{index}", label=f"gain, {name}")
        by_depth(axes, study.rows, ratios, color=f"C{index}", label=f"change ratio, {name}", style="--")
    axes.axhline(1, color="black", lw=0.8)
    depth_axis(axes, studies)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="loops", ylabel="factor", title="Gain of the last loop, and its change ratio")


def _draw_repetition(axes: Any, studies: Sequence[CurveStudy]) -> None:
    for index, study in enumerate(studies):
        values = [row.repetition_rate for row in study.rows]
        by_depth(axes, study.rows, values, color=f"C{index}", label=_name(study, studies))
    depth_axis(axes, studies)
    _thresholds(axes, studies)
    axes.set_ylim(-0.03, 1.03)
    axes.set(xlabel="loops", ylabel="share of four-token pieces", title="Repetition in greedy texts")


def _thresholds(axes: Any, studies: Sequence[CurveStudy]) -> None:
    for index, study in enumerate(studies):
        if (depth := study.harmful_beyond) is not None:
            axes.axvline(depth, ls=":", lw=1.5, color=f"C{index}", label=f"overthinking threshold {depth}")


def _name(study: CurveStudy, studies: Sequence[CurveStudy]) -> str:
    several = len({other.first.seed for other in studies}) > 1
    return f"{study.first.dataset}, seed {study.first.seed}" if several else study.first.dataset


def _deepest(studies: Sequence[CurveStudy], name: str) -> list[ResultRow]:
    """The deepest row of each data set that has ``name``."""
    rows: dict[str, ResultRow] = {}
    for study in studies:
        for row in study.rows:
            known = rows.get(row.dataset)
            if getattr(row, name) is not None and (known is None or row.loop_count > known.loop_count):
                rows[row.dataset] = row
    return list(rows.values())
