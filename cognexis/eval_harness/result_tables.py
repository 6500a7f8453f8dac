"""Rows as a summary and as a table.

``summary`` describes one set of rows: means over them, and the depth metrics of the curve that the fixed ones make.
Means over different metrics say nothing, so they are None unless all rows have one metric; so are the depth metrics
unless the rows make one curve. ``write_csv`` writes columns of a fixed order after RFC 4180.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cognexis.checkpoints.json_file import write_bytes, write_json
from cognexis.eval_harness.metrics.depth_results import DepthOptions, dei_results, dgr_results, lsp_results, ot_results
from cognexis.eval_harness.results import ResultRow

CSV_COLUMNS = (
    *("checkpoint", "tokenizer_checksum", "dataset", "split", "loop_mode", "loop_count", "metric_name"),
    *("metric_value", "latency_ms_mean", "flops_mean", "hardware", "dtype", "seed", "average_loops_used"),
    *("loop_count_histogram", "halt_reasons", "scheduler_overhead_ms_mean", "budget_violation_count"),
)


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """Mean of the values that exist; None if none does."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def summary(rows: Sequence[ResultRow], options: DepthOptions | None = None) -> dict[str, Any]:
    """One dictionary of a set of rows.

    Args:
        options: of the depth metrics; their direction and unit come from the rows.

    Returns:
        ``row_count``, ``min_loop_count``, ``max_loop_count``, ``metric_value_mean``, ``latency_ms_mean``,
        ``flops_mean``, and the dictionaries ``dei``, ``lsp``, ``ot`` and ``dgr``, each None where it has no meaning.
    """
    names = {row.metric_name for row in rows}
    counts = [row.loop_count for row in rows]
    return {
        "row_count": len(rows),
        "min_loop_count": min(counts, default=None),
        "max_loop_count": max(counts, default=None),
        "metric_value_mean": mean_or_none(row.metric_value for row in rows) if len(names) == 1 else None,
        "latency_ms_mean": mean_or_none(row.latency_ms_mean for row in rows),
        "flops_mean": mean_or_none(row.flops_mean for row in rows),
        **depth_summary(rows, options),
    }


def depth_summary(rows: Sequence[ResultRow], options: DepthOptions | None = None) -> dict[str, Any]:
    """The depth metrics of the fixed, completed rows, as ``dei``, ``lsp``, ``ot`` and ``dgr``."""
    fixed = [row for row in rows if row.loop_mode == "fixed" and row.metric_value is not None]
    empty = dict.fromkeys(("dei", "lsp", "ot", "dgr"))
    if len({row.curve for row in fixed}) != 1:
        return empty
    given = options or DepthOptions()
    chosen = DepthOptions(
        **{**vars(given), "direction": fixed[0].metric_direction, "compute_unit": fixed[0].compute_unit}
    )
    depths = [row.loop_count for row in fixed]
    scores = [row.metric_value for row in fixed if row.metric_value is not None]
    compute = [row.flops_mean for row in fixed if row.flops_mean is not None]
    without = {"ot": ot_results(depths, scores, depths, chosen), "dgr": dgr_results(depths, scores, depths, chosen)}
    if len(compute) < len(fixed):
        return empty | without
    return {
        "dei": dei_results(depths, scores, compute, chosen),
        "lsp": lsp_results(depths, scores, compute, chosen),
        **without,
    }


def curves(rows: Iterable[ResultRow]) -> list[list[ResultRow]]:
    """The rows by curve over depth, in order of first appearance, each curve by depth."""
    found: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        found.setdefault(row.curve, []).append(row)
    return [sorted(curve, key=lambda row: row.loop_count) for curve in found.values()]


def write_summary(path: Path, rows: Sequence[ResultRow], options: DepthOptions | None = None) -> None:
    """Write the summary of all rows, with one of every curve under ``curves``."""
    parts = [
        {
            "checkpoint": curve[0].checkpoint,
            "dataset": curve[0].dataset,
            "split": curve[0].split,
            "loop_mode": curve[0].loop_mode,
            "metric_name": curve[0].metric_name,
            "seed": curve[0].seed,
            **summary(curve, options),
        }
        for curve in curves(rows)
    ]
    write_json(path, {**summary(rows, options), "curves": parts})


def csv_text(rows: Iterable[ResultRow]) -> str:
    """A table with ``CSV_COLUMNS``; parts of a list are joined by a semicolon, None is empty."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        values = row.model_dump(mode="json")
        values |= values.pop("scheduler_diagnostics") or {}
        writer.writerow([_cell(values.get(column)) for column in CSV_COLUMNS])
    return stream.getvalue()


def write_csv(path: Path, rows: Iterable[ResultRow]) -> None:
    """Replace ``path`` by the table."""
    write_bytes(path, csv_text(rows).encode("utf-8"))


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return ";".join(f"{key}:{part}" for key, part in value.items())
    return ";".join(map(str, value)) if isinstance(value, list) else value
