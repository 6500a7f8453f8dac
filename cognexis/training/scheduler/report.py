"""The report on a value head as JSON, Markdown and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cognexis.checkpoints.json_file import write_json
from cognexis.errors import InvalidConfigError

REPORT_VERSION = 1


def write_report(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write ``report.json``, ``report.md`` and, where matplotlib is installed, ``report.png``.

    Returns:
        The files that were written.

    Raises:
        InvalidConfigError: the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfigError(f"out={str(folder)!r}: cannot be used: {error.strerror}", path="out") from error
    written = [folder / "report.json", folder / "report.md"]
    write_json(written[0], report)
    written[1].write_text(markdown(report), "utf-8")
    if draw_plot(folder / "report.png", report):
        written.append(folder / "report.png")
    return written


def markdown(report: dict[str, Any]) -> str:
    """The report for readers."""
    facts, head, overhead = report["facts"], report["value_head"], report["overhead"]
    sections = [
        "# Value head",
        f"{facts['num_rows']} rows, {facts['num_tokens']} tokens with a target ({facts['rows']}), depth "
        f"{facts['num_loops']}, halting by {facts['halt_dependency']}.",
        "## Predicted gain against measured gain",
        table(
            ("predictor", "MAE", "rank correlation", "of all gains", "AUROC"),
            [(name, *(_shown(row[key]) for key in _RANKING_KEYS)) for name, row in report["predictors"].items()],
        ),
        "The constant and the rules' signals are fitted on these very rows, which favours them. The rank correlation "
        f"and the AUROC take gains of at most {_shown(facts['gain_threshold'])} nats as none.",
        "## Calibration",
        f"Method {facts['calibration'] or 'none'}; calibration error {_shown(head['calibration_error'])} "
        f"(without it {_shown(report['uncalibrated']['calibration_error'])}), MAE {_shown(head['mae'])} "
        f"({_shown(report['uncalibrated']['mae'])}). Below the threshold {_shown(facts['threshold'])}: "
        f"{head['false_halt_rate']:.2%} of the slots halt wrongly, {head['false_continue_rate']:.2%} go on wrongly.",
        table(
            ("loop", *map(str, range(1, len(head["mae_by_loop"]) + 1))),
            [("MAE", *(_shown(value) for value in head["mae_by_loop"]))],
        ),
        "## Quality against loops",
        f"Thresholds were chosen where the head was calibrated, for halting by {facts['halt_dependency']} and within "
        f"{facts['tolerance']} nats of full depth, and run here; regret is the distance to an oracle that knows "
        "every loss and whose halted tokens loop on.",
        *(
            text
            for dependency, rows in report["operating_points"].items()
            for text in (f"Halting by {dependency}:", _points_table(rows))
        ),
        "## Cost",
        f"On {overhead['num_rows']} rows of {overhead['length']} tokens ({overhead['device']}), one loop of the core "
        f"takes {overhead['core_seconds'] * 1e3:.3g} ms, the head {overhead['head_seconds'] * 1e3:.3g} ms, what its "
        f"features need besides {overhead['signal_seconds'] * 1e3:.3g} ms.",
        f"{report['decision'][0].upper()}{report['decision'][1:]}.",
    ]
    return "\n\n".join(sections) + "\n"


_RANKING_KEYS = ("mae", "rank_correlation", "rank_correlation_of_all", "auroc")
_POINT_KEYS = ("threshold", "mean_loops", "loss", "accuracy", "loops_regret", "loss_regret")


def _points_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ("policy", "threshold", "mean loops", "loss", "accuracy", "loops regret", "loss regret")
    return table(header, [(row["policy"], *(_shown(row[key]) for key in _POINT_KEYS)) for row in rows])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def draw_plot(path: Path, report: dict[str, Any]) -> bool:
    """Draw the frontiers by dependency, and the reliability curve; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    dependencies = list(report["frontiers"])
    figure = Figure(figsize=(5 * (len(dependencies) + 1), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(dependencies) + 1, squeeze=False)[0]
    for panel, dependency in zip(axes, dependencies, strict=False):
        for name, points in report["frontiers"][dependency].items():
            style = {"oracle": "k--", "constant": "k:"}.get(name, "-")
            x, y = [point["mean_loops"] for point in points], [point["loss"] for point in points]
            panel.plot(x, y, style, label=name, linewidth=1.2)
        panel.set(title=f"halting by {dependency}", xlabel="mean loops", ylabel="loss (nats)")
        panel.legend(fontsize=8)
    for label, key in (("calibrated", "value_head"), ("uncalibrated", "uncalibrated")):
        curve = report[key]["reliability"]
        x, y = [entry["predicted"] for entry in curve], [entry["measured"] for entry in curve]
        axes[-1].plot(x, y, "o-", markersize=3, linewidth=1.2, label=label)
    low, high = axes[-1].get_xlim()
    axes[-1].plot((low, high), (low, high), "k:", linewidth=0.8)
    axes[-1].set(title="reliability", xlabel="predicted", ylabel="measured")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return True
