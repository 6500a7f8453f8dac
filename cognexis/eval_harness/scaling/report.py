"""The report of a loop-scaling study: Markdown with pictures beside it, and one HTML file that holds everything.

Everything is made from the rows (and the scores of single examples, where they are given); no clock, no machine and no
model is asked, so a report that is made again from the same files has the same bytes.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cognexis.checkpoints.json_file import write_bytes, write_json
from cognexis.eval_harness.scaling.figures import compute_unit
from cognexis.eval_harness.scaling.overthinking import (
    Table,
    change_ratio,
    continuation_table,
    depth_label,
    judged_studies,
    leading_studies,
    loops,
    number,
    overthinking_table,
    scheduler_table,
    signs,
    without_doubles,
)
from cognexis.eval_harness.scaling.plots import (
    efficiency_by_depth,
    latency_by_loops,
    quality_by_compute,
    quality_by_loops,
)
from cognexis.eval_harness.scaling.state_plots import has_signs, signs_by_depth, state_by_loop
from cognexis.eval_harness.scaling.study import CurveStudy


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
    pictures = {}
    for title, group in _groups(studies).items():
        pictures[f"quality-loops-{_slug(title)}"] = quality_by_loops(group)
        if all(row.flops_mean is not None for study in group for row in study.rows):
            pictures[f"quality-compute-{_slug(title)}"] = quality_by_compute(group)
        if any(study.depth_metrics["dei"] for study in group):
            pictures[f"efficiency-{_slug(title)}"] = efficiency_by_depth(group)
    rows = [row for study in studies for row in study.rows]
    if any(row.hidden_norms is not None for row in rows):
        pictures["state"] = state_by_loop(studies)
    if has_signs(rows):
        pictures["overthinking"] = signs_by_depth(studies)
    if any(row.latency_ms_mean is not None for row in rows):
        pictures["latency"] = latency_by_loops(studies)
    return pictures


def _groups(studies: Sequence[CurveStudy]) -> dict[str, list[CurveStudy]]:
    """Curves that share pictures, by title; those in which nothing changes are not drawn."""
    groups: dict[str, list[CurveStudy]] = {}
    for study in without_doubles(studies):
        if len({row.metric_value for row in study.rows}) > 1 or len(study.rows) == 1:
            groups.setdefault(study.title, []).append(study)
    return groups


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


@dataclass(frozen=True)
class Section:
    """A part of the report; ``pictures`` are names, shown where they were drawn."""

    heading: str
    text: str = ""
    table: Table = field(default_factory=list)
    pictures: tuple[str, ...] = ()


def sections(studies: Sequence[CurveStudy]) -> list[Section]:
    """The parts of the report."""
    parts = [
        Section("What was measured", "", _facts(studies)),
        Section("Result", _conclusion(studies), _depth_table(studies)),
        Section("What follows for a scheduler", "", scheduler_table(studies)),
    ]
    drawn: set[str] = set()
    for study in studies:
        slug = _slug(study.title)
        names = () if slug in drawn else (f"quality-loops-{slug}", f"quality-compute-{slug}", f"efficiency-{slug}")
        drawn.add(slug)
        parts.append(Section(f"{study.title}, seed {study.first.seed}", "", _row_table(study), names))
    if any(study.adaptive for study in studies):
        text = "Each adaptive run beside the fixed curve at the same compute, interpolated between depths."
        parts.append(Section("Adaptive depth at equal compute", text, _adaptive_table(studies)))
    parts.append(Section("Time", "", [], ("latency",)))
    parts.append(Section("Overthinking", _SIGNS, [], ("state", "overthinking")))
    for study in leading_studies(studies):
        title = f"Overthinking: {study.first.dataset}, seed {study.first.seed}"
        parts.append(Section(title, " ".join(signs(study)), overthinking_table(study)))
    for study in leading_studies(studies):
        if table := continuation_table(study):
            parts.append(Section(f"The same prompts at every depth: {study.first.dataset}", "", table))
    failed = [row for study in studies for row in study.failed]
    table = [["data set", "metric", "loops", "reason"]]
    table += [[row.dataset, row.metric_name, str(row.loop_count), row.detail] for row in failed]
    parts.append(Section("Failures", "" if failed else "No run failed.", table if failed else []))
    return [replace(part, table=_without_empty_columns(part.table)) for part in parts]


def _without_empty_columns(table: Table) -> Table:
    """The table without the columns that hold dashes only."""
    body = table[1:]
    assert len({*map(len, table)}) < 2
    kept = [place for place in range(len(table[0]) if body else 0) if any(row[place] != "–" for row in body)]
    return [[row[place] for place in kept] for row in table] if body else table


_SIGNS = (
    "Norms and changes are of the state of the core; the change ratio is the change in the last loop over that in the "
    "loop before: below 1 the state settles, and where it has settled the ratio is left out. The gain of a loop is "
    "the largest factor by which it stretches a small difference of states. Entropies are in nats. Repeated is the "
    "share of four-token pieces of greedy texts that occurred before in the same text."
)


def markdown(studies: Sequence[CurveStudy], pictures: Sequence[str]) -> str:
    """The report as Markdown, with links to ``plots/``."""
    lines = ["# Loop scaling", ""]
    for part in _shown(studies, pictures):
        lines += [f"## {part.heading}", "", *([part.text, ""] if part.text else [])]
        if part.table:
            head, *body = [[cell.replace("|", "\\|") for cell in row] for row in part.table]
            lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)] + [""]
        lines += [f"![{name.replace('-', ' ')}](plots/{name}.png)\n" for name in part.pictures]
    return "\n".join(lines)


def _shown(studies: Sequence[CurveStudy], pictures: Sequence[str]) -> list[Section]:
    """The sections, each with those of its pictures that exist."""
    parts = [replace(part, pictures=tuple(n for n in part.pictures if n in pictures)) for part in sections(studies)]
    return [part for part in parts if part.text or part.table or part.pictures]


_STYLE = """body{font:16px/1.5 sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.85rem;display:block;overflow-x:auto}
td,th{border:1px solid #ccc;padding:.25rem .6rem;vertical-align:top}
th{background:#f3f3f3;text-align:left}td{font-variant-numeric:tabular-nums}img{max-width:100%;margin:.5rem 0}"""


def page(studies: Sequence[CurveStudy], pictures: dict[str, bytes]) -> str:
    """The report as one HTML page without references to other files."""
    body = ["<h1>Loop scaling</h1>"]
    for part in _shown(studies, list(pictures)):
        body.append(f"<h2>{html.escape(part.heading)}</h2>")
        if part.text:
            body.append(f"<p>{html.escape(part.text)}</p>")
        if part.table:
            head, *rows = [[html.escape(cell) for cell in row] for row in part.table]
            body.append(f"<table><tr><th>{'</th><th>'.join(head)}</th></tr>")
            body += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows] + ["</table>"]
        for name in part.pictures:
            source = base64.b64encode(pictures[name]).decode()
            body.append(f'<img alt="{html.escape(name.replace("-", " "))}" src="data:image/png;base64,{source}">')
    top = f'<meta charset="utf-8"><title>Loop scaling</title><style>{_STYLE}</style>'
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{top}</head><body>', *body, "</body></html>", ""])


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
    judged = judged_studies(studies)
    caps = [study.recommended_cap for study in judged if study.recommended_cap is not None]
    defaults = [study.recommended_default for study in judged if study.recommended_default is not None]
    if not caps:
        return "No difference between depths is larger than its noise, or fewer than two depths were measured."
    cap = f"A scheduler for these tasks should not go beyond {loops(min(caps))}"
    cap += f" (by task {min(caps)} to {max(caps)})" if min(caps) < max(caps) else ""
    if not defaults:
        return f"{cap}. No saturation point is defined."
    low, high = min(defaults), max(defaults)
    return f"{cap}. The saturation point is {loops(high) if low == high else f'{low} to {high} loops'}."


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
                ", ".join(f"{name} {number(depth)}" for name, depth in others.items()) or "–",
                _with_interval(ot, "overthinking_threshold"),
                number(ot.get("first_harmful_depth")),
                number(study.best_depth),
                _with_interval(dgr, "depth_gain_ratio"),
            ]
        )
    return table


def _with_interval(result: dict[str, Any], name: str) -> str:
    value = result.get(name)
    if value is None:
        return str(result.get(f"{name}_undefined") or "–").replace("_", " ")
    interval = result.get(f"{name}_confidence_interval")
    return number(value) + (f" [{number(interval[0])}, {number(interval[1])}]" if interval else "")


def _row_table(study: CurveStudy) -> Table:
    scale, unit = compute_unit([*study.rows, *study.failed])
    head = ["loops", study.first.metric_name.replace("_", " "), "standard error", "of the difference", unit]
    head += ["gain per compute of the step to here", "latency ms, mean", "p50", "p90", "p99", "memory MiB"]
    table = [[*head, "not finite", "depth"]]
    dei = study.depth_metrics["dei"] or {}
    depths = dei.get("depth_efficiency_index_depths", [])
    values = dei.get("depth_efficiency_index", [])
    steps = {pair[1]: None if value is None else value * scale for pair, value in zip(depths, values, strict=True)}
    for row in study.rows:
        memory = None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**20
        table.append(
            [
                *(str(row.loop_count), number(row.metric_value), number(row.standard_error, 2)),
                number(study.difference_errors.get(row.loop_count), 2),
                *(
                    number(row.flops_mean and row.flops_mean / scale),
                    number(steps.get(row.loop_count), 3),
                    number(row.latency_ms_mean, 3),
                ),
                *(number(value, 3) for value in (row.latency_ms_p50, row.latency_ms_p90, row.latency_ms_p99)),
                *(number(memory), number(row.non_finite_count), depth_label(row, study)),
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
                    number(diagnostics.average_loops_used if diagnostics else None, 3),
                    *(number(value) for value in (point.row.metric_value, point.fixed_value, point.advantage)),
                ]
            )
    return table


def _plot_data(study: CurveStudy) -> dict[str, Any]:
    names = (
        *("loop_count", "metric_value", "standard_error", "flops_mean", "latency_ms_mean", "latency_ms_p90"),
        *("prediction_entropy", "loop_gain", "repetition_rate", "extrapolated"),
    )
    return {
        "title": study.title,
        "seed": study.first.seed,
        **{name: [getattr(row, name) for row in study.rows] for name in names},
        "hidden_norms": [row.hidden_norms for row in study.rows],
        "hidden_deltas": [row.hidden_deltas for row in study.rows],
        "change_ratio": [change_ratio(row) for row in study.rows],
        "attention_entropies": [row.attention_entropies for row in study.rows],
        **study.depth_metrics,
    }
