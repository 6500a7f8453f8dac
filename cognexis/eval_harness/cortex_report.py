"""Rows of an evaluation as a table, as JSON and as a picture.

A row is what one stack did on one task, a flat JSON object; ``COLUMNS`` says which of its entries a table shows.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Row], str]] = {
    "task": lambda row: row["task"],
    "stack": lambda row: row["stack"],
    "parameters": lambda row: f"{row['num_parameters']:,}" if "num_parameters" in row else "",
    "test accuracy": lambda row: f"{row['test_accuracy']:.3f}" if "test_accuracy" in row else row["status"],
    "guessing": lambda row: f"{row['majority_class']:.3f}" if "majority_class" in row else "",
    "epochs": lambda row: str(len(row["history"])) if "history" in row else "",
    "seconds": lambda row: f"{row['seconds']:.0f}" if "seconds" in row else "",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
}


def _cells(rows: Iterable[Row]) -> list[list[str]]:
    return [list(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in rows)]


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal."""
    cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(rows: Sequence[Row]) -> str:
    """The same as a Markdown table."""
    heading, *body = _cells(rows)
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file; a line that was cut off while it was written is left out."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: line %d is incomplete and left out", path, number)
    return rows


def write_reports(folder: Path, rows: Sequence[Row], *, plot: bool = True) -> list[Path]:
    """Write ``summary.json``, ``summary.md`` and, if matplotlib is there, ``accuracy.png``.

    Returns:
        The files that were written.
    """
    written = [folder / "summary.json", folder / "summary.md"]
    written[0].write_text(json.dumps(list(rows), indent=2) + "\n", "utf-8")
    written[1].write_text(f"# Memory stacks\n\n{markdown_table(rows)}\n", "utf-8")
    if plot and any("history" in row for row in rows):
        path = folder / "accuracy.png"
        if draw_plot(path, rows):
            written.append(path)
    return written


def draw_plot(path: Path, rows: Sequence[Row]) -> bool:
    """Draw per task the test accuracies and the course of the validation accuracy; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no picture: matplotlib is not installed (pip install 'cognexis[eval]')")
        return False
    done = [row for row in rows if "history" in row]
    tasks = list(dict.fromkeys(row["task"] for row in done))
    figure = Figure(figsize=(11, 3.2 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (bars, curves), task in zip(axes, tasks, strict=True):
        some = [row for row in done if row["task"] == task]
        colors = [f"C{index % 10}" for index in range(len(some))]
        accuracies = [row["test_accuracy"] for row in some]
        drawn = bars.barh([row["stack"] for row in some], accuracies, color=colors)
        bars.bar_label(drawn, fmt="%.3f", padding=3)
        guessing = sum(row["majority_class"] for row in some) / len(some)
        bars.axvline(guessing, color="black", linestyle="--", linewidth=1, label=f"guessing ({guessing:.2f})")
        bars.invert_yaxis()
        bars.set(title=task, xlabel="test accuracy", ylabel="stack", xlim=(0, 1.12))
        bars.legend(loc="lower left")
        for row, color in zip(some, colors, strict=True):
            epochs = range(1, len(row["history"]) + 1)
            values = [entry["val_accuracy"] for entry in row["history"]]
            curves.plot(epochs, values, color=color, marker="o", markersize=3, label=row["stack"])
        curves.set(title=task, xlabel="epoch", ylabel="validation accuracy", ylim=(0, 1.05))
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.grid(alpha=0.3)
        curves.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True
