"""The files of an ablation: runs as JSONL, results and summary as JSON, pictures with their data, and a report.

results.jsonl      one line for each run, in the order of the plan
summary.json       counts, the best difference, and one result for each experiment
plots/<x>.json     the numbers of a picture; plots/<x>.png the picture, where matplotlib is installed
report.md          all of it to read
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cognexis.checkpoints.json_file import write_bytes, write_json
from cognexis.eval_harness.ablations.plan import BASELINE, Plan
from cognexis.eval_harness.ablations.plot_data import completed, depth_data, difference_data, pareto_data, sweep_data
from cognexis.eval_harness.ablations.plots import depth_picture, difference_picture, pareto_picture, sweep_picture
from cognexis.eval_harness.ablations.records import AblationResult, AblationRun
from cognexis.eval_harness.ablations.summary import results_of, summarize
from cognexis.eval_harness.ablations.sweeps import folder_name
from cognexis.eval_harness.result_tables import mean_or_none


def write_results(folder: Path, plan: Plan, runs: Sequence[AblationRun]) -> list[Path]:
    """Write every file from the runs alone; their paths."""
    results = results_of(plan, runs)
    lines = "".join(json.dumps(run.model_dump(mode="json"), allow_nan=False) + "\n" for run in runs)
    paths = [folder / "results.jsonl", folder / "summary.json", folder / "report.md"]
    write_bytes(paths[0], lines.encode())
    dumped = [result.model_dump(mode="json") for result in results]
    write_json(paths[1], {**summarize(results), "left_out": plan.left_out, "results": dumped})
    pictures = _write_pictures(folder / "plots", plan, runs, results)
    write_bytes(paths[2], report_text(plan, runs, results, [path.name for path in pictures]).encode())
    return [*paths, *pictures]


def _write_pictures(
    folder: Path, plan: Plan, runs: Sequence[AblationRun], results: Sequence[AblationResult]
) -> list[Path]:
    drawn: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], bytes]]] = {
        "differences": (difference_data(plan, results), difference_picture),
        "depths": (depth_data(plan, runs), depth_picture),
        "pareto": (pareto_data(plan, runs), pareto_picture),
    }
    drawn |= {f"sweep-{folder_name(name)}": (sweep_data(plan, runs, name), sweep_picture) for name in plan.sweeps}
    folder.mkdir(exist_ok=True)
    pictures = []
    can_draw = importlib.util.find_spec("matplotlib") is not None
    for name, (data, draw) in drawn.items():
        write_json(folder / f"{name}.json", data)
        if can_draw:
            write_bytes(folder / f"{name}.png", draw(data))
            pictures.append(folder / f"{name}.png")
    return pictures


def report_text(
    plan: Plan, runs: Sequence[AblationRun], results: Sequence[AblationResult], pictures: Sequence[str]
) -> str:
    """The report in Markdown."""
    first = plan.experiments[0].record
    counts = summarize(results)
    metric = plan.file.metric.replace("_", " ")
    unit = "nats per token, lower is better" if plan.file.metric == "negative_log_likelihood" else "higher is better"
    lines = [
        f"# Ablations of {plan.file.name}",
        "",
        f"Metric: {metric} of held-out text ({unit}). Data: {', '.join(first.suite)}. Budget: {first.budget}. "
        f"Seeds: {', '.join(map(str, first.seeds))}. Hardware: {first.hardware}.",
        "",
        f"{counts['runs']} experiments: "
        + ", ".join(f"{counts[name]} {name}" for name in ("completed", "unstable", "failed", "planned"))
        + ".",
        "",
        "A difference is the mean over seeds of variant minus baseline with the same seed; above 0 the variant is "
        "better. The error is one standard error over seeds.",
        "",
        "| experiment | without, or changed | how | status | difference | error | FLOPs per token | parameters |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    own = completed(runs, BASELINE)
    value = mean_or_none(run.metric_value for run in own)
    lines.append(
        f"| baseline | | {first.method.value} | {_baseline_status(runs)} | {_number(value)} (value) | | "
        f"{_count(mean_or_none(run.flops_per_token for run in own))} | {plan.experiments[0].parameter_count:,} |"
    )
    for result in results:
        count = "" if result.parameter_count is None else f"{result.parameter_count:,}"
        lines.append(
            f"| {result.name} | {result.plan.changed_factor} | {result.plan.method.value} | {result.status.value} | "
            f"{_number(result.metric_delta, sign=True)} | {_number(result.metric_delta_error)} | "
            f"{_count(result.compute_delta, sign=True)} | {count} |"
        )
    lines += [
        "",
        "`retrained` variants learn without the part; `switched` ones are the baseline's own weights, run otherwise.",
    ]
    if notes := [f"- {result.name}: {note}" for result in results for note in result.notes]:
        lines += ["", "## Notes", "", *notes]
    if plan.left_out:
        lines += ["", "## Left out", "", *(f"- {name}: {reason}" for name, reason in plan.left_out.items())]
    lines += ["", "## Hypotheses", "", *(f"- {result.name}: {result.plan.hypothesis}" for result in results)]
    if pictures:
        lines += ["", "## Pictures", "", *(f"![{name.partition('.')[0]}](plots/{name})" for name in pictures)]
    return "\n".join(lines) + "\n"


def _baseline_status(runs: Sequence[AblationRun]) -> str:
    states = [run.status.value for run in runs if run.experiment == BASELINE]
    return next((state for state in states if state != "completed"), "completed")


def _number(value: float | None, *, sign: bool = False) -> str:
    return "" if value is None else f"{value:+.4f}" if sign else f"{value:.4f}"


def _count(value: float | None, *, sign: bool = False) -> str:
    return "" if value is None else f"{value:+,.0f}" if sign else f"{value:,.0f}"
