"""The report of a loop-scaling study: Markdown with pictures beside it, and one HTML file that holds everything.

Everything is made from the rows (and the scores of single examples, where they are given); no clock, no machine and no
model is asked, so a report that is made again from the same files has the same bytes.
"""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cognexis.checkpoints.json_file import write_bytes, write_json
from cognexis.eval_harness.scaling.plots import (
    efficiency_by_depth,
    latency_by_loops,
    quality_by_compute,
    quality_by_loops,
    state_by_loop,
)
from cognexis.eval_harness.scaling.study import CurveStudy

Table = list[list[str]]


def write_report(folder: Path, studies: Sequence[CurveStudy]) -> list[Path]:
    """Write ``report.md``, ``report.html``, ``plots/*.png`` and ``plot_data.json``; the files, in that order.

    Raises:
        BackendError: matplotlib is not installed.
    """
    pictures = draw_all(studies)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.md", folder / "report.html"]
    write_bytes(paths[0], markdown(studies, list(pictures)).encode())
    write_bytes(paths[1], page(studies, pictures).encode())
    for name, data in pictures.items():
        paths.append(folder / "plots" / f"{name}.png")
        write_bytes(paths[-1], data)
    paths.append(folder / "plot_data.json")
    write_json(paths[-1], [_plot_data(study) for study in studies])
    return paths


def draw_all(studies: Sequence[CurveStudy]) -> dict[str, bytes]:
    """Every picture by name; curves of one data set and metric share one. Perplexity is drawn without its log only."""
    groups: dict[str, list[CurveStudy]] = {}
    logs = {study.first.dataset for study in studies if study.first.metric_name == "negative_log_likelihood"}
    for study in studies:
        if study.rows and not (study.first.metric_name == "perplexity" and study.first.dataset in logs):
            groups.setdefault(study.title, []).append(study)
    pictures = {}
    for title, group in groups.items():
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        pictures[f"quality-loops-{slug}"] = quality_by_loops(group)
        if all(row.flops_mean is not None for study in group for row in study.rows):
            pictures[f"quality-compute-{slug}"] = quality_by_compute(group)
        if any(study.depth_metrics["dei"] for study in group):
            pictures[f"efficiency-{slug}"] = efficiency_by_depth(group)
    if any(row.hidden_norms is not None for study in studies for row in study.rows):
        pictures["state"] = state_by_loop(studies)
    if any(row.latency_ms_mean is not None for study in studies for row in study.rows):
        pictures["latency"] = latency_by_loops(studies)
    return pictures


def sections(studies: Sequence[CurveStudy]) -> list[tuple[str, str, Table]]:
    """Heading, sentence and table of each part of the report."""
    parts = [("What was measured", "", _facts(studies)), ("Result", _conclusion(studies), _depth_table(studies))]
    for study in studies:
        parts.append((f"{study.title}, seed {study.first.seed}", "", _row_table(study)))
    if any(study.adaptive for study in studies):
        text = "Each adaptive run beside the fixed curve at the same compute, interpolated between depths."
        parts.append(("Adaptive depth at equal compute", text, _adaptive_table(studies)))
    text = "Quality from its best depth to the deepest, and how much the norm of the state grows on the way."
    parts.append(("Overthinking", text, _overthinking_table(studies)))
    failed = [row for study in studies for row in study.failed]
    table = [["data set", "loops", "reason"], *([row.dataset, str(row.loop_count), row.detail] for row in failed)]
    parts.append(("Failures", "" if failed else "No run failed.", table if failed else []))
    return parts


def markdown(studies: Sequence[CurveStudy], pictures: Sequence[str]) -> str:
    """The report as Markdown, with links to ``plots/``."""
    lines = ["# Loop scaling", ""]
    for heading, text, table in sections(studies):
        lines += [f"## {heading}", "", *([text, ""] if text else [])]
        if table:
            head, *body = [[cell.replace("|", "\\|") for cell in row] for row in table]
            lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)] + [""]
    lines += ["## Pictures", "", *(f"![{name.replace('-', ' ')}](plots/{name}.png)\n" for name in pictures)]
    return "\n".join(lines)


_STYLE = """body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.9rem}td,th{border:1px solid #ccc;padding:.25rem .6rem}
th{background:#f3f3f3;text-align:left}td{font-variant-numeric:tabular-nums}img{max-width:100%;margin:.5rem 0}"""


def page(studies: Sequence[CurveStudy], pictures: dict[str, bytes]) -> str:
    """The report as one HTML page without references to other files."""
    body = ["<h1>Loop scaling</h1>"]
    for heading, text, table in sections(studies):
        body.append(f"<h2>{html.escape(heading)}</h2>")
        if text:
            body.append(f"<p>{html.escape(text)}</p>")
        if table:
            head, *rows = [[html.escape(cell) for cell in row] for row in table]
            body.append(f"<table><tr><th>{'</th><th>'.join(head)}</th></tr>")
            body += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows] + ["</table>"]
    body.append("<h2>Pictures</h2>")
    for name, data in pictures.items():
        source = base64.b64encode(data).decode()
        body.append(f'<img alt="{html.escape(name.replace("-", " "))}" src="data:image/png;base64,{source}">')
    top = f'<meta charset="utf-8"><title>Loop scaling</title><style>{_STYLE}</style>'
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{top}</head><body>', *body, "</body></html>", ""])


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _facts(studies: Sequence[CurveStudy]) -> Table:
    rows = [row for study in studies for row in (*study.rows, *study.failed)]

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))

    versions = {f"{name} {version}": None for row in rows for name, version in row.versions.items()}
    beyond = sorted({row.loop_count for row in rows if row.extrapolated})
    nonstandard = {feature: None for row in rows for feature in row.nonstandard_features}
    return [
        ["what", "value"],
        ["checkpoint", all_of("checkpoint")],
        ["tokenizer", all_of("tokenizer_checksum")],
        ["data sets", all_of("dataset")],
        ["depths", ", ".join(map(str, sorted({row.loop_count for row in rows})))],
        ["beyond the depth of training", ", ".join(map(str, beyond)) or "none"],
        ["hardware, type of numbers", f"{all_of('hardware')}; {all_of('dtype')}"],
        ["versions", ", ".join(versions) or "not recorded"],
        ["nonstandard features", ", ".join(nonstandard) or "none"],
    ]


def _conclusion(studies: Sequence[CurveStudy]) -> str:
    caps = [study.recommended_cap for study in studies if study.recommended_cap is not None]
    defaults = [study.recommended_default for study in studies if study.recommended_default is not None]
    if not caps:
        return "No depth metric is defined on these rows."
    cap = f"A scheduler for these tasks should not go beyond {min(caps)} loops"
    cap += f" (by task {min(caps)} to {max(caps)})" if min(caps) < max(caps) else ""
    if not defaults:
        return f"{cap}. No step in depth improves a task."
    spread = f"{min(defaults)}" if min(defaults) == max(defaults) else f"{min(defaults)} to {max(defaults)}"
    return f"{cap}. The step that pays most leads to {spread} loops."


def _depth_table(studies: Sequence[CurveStudy]) -> Table:
    table = [
        [
            *("data set", "metric", "seed", "saturation point", "its definition", "other definitions"),
            *("overthinking threshold", "first harmful depth", "best depth", "depth gain ratio"),
        ]
    ]
    for study in studies:
        lsp, ot, dgr = (study.depth_metrics[name] or {} for name in ("lsp", "ot", "dgr"))
        others = dict(lsp.get("loop_saturation_point_by_definition", {}))
        others.pop(lsp.get("loop_saturation_point_definition"), None)
        table.append(
            [
                *(study.first.dataset, study.first.metric_name, str(study.first.seed)),
                _with_interval(lsp, "loop_saturation_point"),
                str(lsp.get("loop_saturation_point_definition", "–")),
                ", ".join(f"{name} {_number(depth)}" for name, depth in others.items()) or "–",
                _with_interval(ot, "overthinking_threshold"),
                _number(ot.get("first_harmful_depth")),
                _number(study.best_depth),
                _with_interval(dgr, "depth_gain_ratio"),
            ]
        )
    return table


def _with_interval(result: dict[str, Any], name: str) -> str:
    value = result.get(name)
    if value is None:
        return str(result.get(f"{name}_undefined") or "–").replace("_", " ")
    interval = result.get(f"{name}_confidence_interval")
    return _number(value) + (f" [{_number(interval[0])}, {_number(interval[1])}]" if interval else "")


def _row_table(study: CurveStudy) -> Table:
    unit = study.first.compute_unit.replace("_", " ").replace("flops", "FLOPs")
    head = ["loops", study.first.metric_name, "standard error", unit, "gain per compute of the step to here"]
    table = [[*head, "latency ms, mean", "p50", "p90", "p99", "memory MiB", "not finite", "trained depth"]]
    dei = study.depth_metrics["dei"] or {}
    depths = dei.get("depth_efficiency_index_depths", [])
    steps = {pair[1]: value for pair, value in zip(depths, dei.get("depth_efficiency_index", []), strict=True)}
    for row in study.rows:
        memory = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**20
        table.append(
            [
                *(str(row.loop_count), _number(row.metric_value), _number(row.standard_error, 2)),
                *(_number(row.flops_mean), _number(steps.get(row.loop_count), 3), _number(row.latency_ms_mean, 3)),
                *(_number(value, 3) for value in (row.latency_ms_p50, row.latency_ms_p90, row.latency_ms_p99)),
                *(_number(memory), _number(row.non_finite_count), "beyond" if row.extrapolated else "within"),
            ]
        )
    return table


def _adaptive_table(studies: Sequence[CurveStudy]) -> Table:
    table = [["data set", "metric", "mode", "mean loops", "adaptive", "fixed at equal compute", "advantage"]]
    for study in studies:
        for point in study.adaptive:
            diagnostics = point.row.scheduler_diagnostics
            table.append(
                [
                    *(study.first.dataset, study.first.metric_name, point.row.loop_mode),
                    _number(diagnostics.average_loops_used if diagnostics else None, 3),
                    *(_number(value) for value in (point.row.metric_value, point.fixed_value, point.advantage)),
                ]
            )
    return table


def _overthinking_table(studies: Sequence[CurveStudy]) -> Table:
    head = ["data set", "metric", "threshold", "best to deepest", "norm", "relative change in the last loop"]
    table = [head]
    for study in studies:
        if not study.rows or study.best_depth is None:
            continue
        deepest = study.rows[-1]
        best = next(row for row in study.rows if row.loop_count == study.best_depth)
        norms, deltas = deepest.hidden_norms or (), deepest.hidden_deltas or ()
        start = norms[study.best_depth] if len(norms) > study.best_depth else None
        end = norms[-1] if norms else None
        growth = end / start if start and end is not None else None
        table.append(
            [
                *(study.first.dataset, study.first.metric_name),
                _with_interval(study.depth_metrics["ot"] or {}, "overthinking_threshold"),
                f"{_number(best.metric_value)} to {_number(deepest.metric_value)}",
                "–" if growth is None else f"x {growth:.3g}",
                _number(deltas[-1] if deltas else None, 3),
            ]
        )
    return table


def _plot_data(study: CurveStudy) -> dict[str, Any]:
    names = ("loop_count", "metric_value", "standard_error", "flops_mean", "latency_ms_mean", "latency_ms_p90")
    return {
        "title": study.title,
        "seed": study.first.seed,
        **{name: [getattr(row, name) for row in study.rows] for name in names},
        "hidden_norms": [row.hidden_norms for row in study.rows],
        "hidden_deltas": [row.hidden_deltas for row in study.rows],
        **study.depth_metrics,
    }
