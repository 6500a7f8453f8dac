"""What the pictures of a report show, as plain data: each picture has a file of numbers beside it.

Values are means over the completed runs of an experiment, bars 95 % intervals of 1.96 standard errors over seeds; runs
that are unstable or failed have no point and are named instead. A point is on the Pareto front if no other is at
least as good at the same or lower compute.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from cognexis.eval_harness.ablations.plan import BASELINE, Plan
from cognexis.eval_harness.ablations.records import AblationResult, AblationRun, AblationStatus
from cognexis.eval_harness.result_tables import mean_or_none

QUANTITIES: dict[str, Callable[[AblationRun], float | None]] = {
    "metric": lambda run: run.metric_value,
    "latency_ms": lambda run: None if run.compared is None else run.compared.latency_ms_mean,
    "state_norm": lambda run: _deepest_norm(run),
    "loops": lambda run: run.mean_loops,
}


def _deepest_norm(run: AblationRun) -> float | None:
    norms = [point.state_norms[-1] for point in run.depths if point.state_norms]
    return norms[-1] if norms else None


def difference_data(plan: Plan, results: Sequence[AblationResult]) -> dict[str, Any]:
    """The differences of all experiments, largest loss first."""
    shown = [result for result in results if result.metric_delta is not None]
    shown.sort(key=lambda result: result.metric_delta or 0.0)
    return {
        "metric": plan.file.metric,
        "experiments": [result.name for result in shown],
        "metric_delta": [result.metric_delta for result in shown],
        "interval": [1.96 * (result.metric_delta_error or 0.0) for result in shown],
        "statuses": [result.status.value for result in shown],
        "without_value": {result.name: result.status.value for result in results if result.metric_delta is None},
    }


def depth_data(plan: Plan, runs: Sequence[AblationRun]) -> dict[str, Any]:
    """Held-out loss by number of loops for each experiment that was trained."""
    curves = {}
    for experiment in plan.experiments:
        own = [
            run for run in completed(runs, experiment.name) if run.method == "retrained" or experiment.name == BASELINE
        ]
        depths = sorted({point.loops for run in own for point in run.depths})
        values = [
            mean_or_none(point.negative_log_likelihood for run in own for point in run.depths if point.loops == loops)
            for loops in depths
        ]
        if depths:
            curves[experiment.name] = {"loops": depths, "negative_log_likelihood": values}
    return {"curves": curves}


def pareto_data(plan: Plan, runs: Sequence[AblationRun]) -> dict[str, Any]:
    """Metric and compute of each experiment, whether it is on the front, and what could not be shown."""
    points: list[dict[str, Any]] = []
    by_last: set[str] = set()
    for experiment in plan.experiments:
        own = completed(runs, experiment.name)
        value = mean_or_none(run.metric_value for run in own)
        flops = mean_or_none(run.flops_per_token for run in own)
        if any(run.compared.loop_mode == "adaptive_sequence" for run in own if run.compared is not None):
            by_last.add(experiment.name)
        elif value is not None and flops is not None:
            points.append({"experiment": experiment.name, "flops_per_token": flops, "metric": value})
    used = [run.in_use for run in completed(runs, BASELINE) if run.in_use is not None]
    value = mean_or_none(use.value(plan.file.metric) for use in used)
    if value is not None and any(use.loop_mode != "fixed" for use in used):
        flops = mean_or_none(use.flops_per_token for use in used)
        points.append({"experiment": f"baseline, {used[0].loop_mode}", "flops_per_token": flops, "metric": value})
    lower = plan.file.metric == "negative_log_likelihood"
    for point in points:
        point["on_front"] = not any(_dominates(other, point, lower) for other in points)
    shown = {point["experiment"] for point in points}
    missing = {
        run.experiment: run.status.value
        for run in runs
        if run.experiment not in shown and run.status != AblationStatus.COMPLETED
    }
    missing |= dict.fromkeys(sorted(by_last), "last tokens only")
    return {"metric": plan.file.metric, "points": points, "without_value": missing}


def _dominates(other: dict[str, Any], point: dict[str, Any], lower: bool) -> bool:
    sign = -1 if lower else 1
    gain = sign * (other["metric"] - point["metric"])
    saved = point["flops_per_token"] - other["flops_per_token"]
    return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)


def sweep_data(plan: Plan, runs: Sequence[AblationRun], name: str) -> dict[str, Any]:
    """The quantities of a sweep by value, in the order of the plan; null where no run completed."""
    data: dict[str, Any] = {"sweep": name, "metric_name": plan.file.metric, "values": []}
    data |= {quantity: [] for quantity in QUANTITIES} | {"metric_interval": [], "statuses": []}
    for value, experiment in plan.sweeps[name]:
        own = completed(runs, experiment)
        data["values"].append(value)
        for quantity, of_run in QUANTITIES.items():
            data[quantity].append(mean_or_none(of_run(run) for run in own))
        metrics = [run.metric_value for run in own if run.metric_value is not None]
        data["metric_interval"].append(_interval(metrics))
        states = [run.status.value for run in runs if run.experiment == experiment]
        data["statuses"].append(next((state for state in states if state != "completed"), "completed"))
    return data


def completed(runs: Sequence[AblationRun], experiment: str) -> list[AblationRun]:
    """The completed runs of an experiment."""
    return [run for run in runs if run.experiment == experiment and run.status == AblationStatus.COMPLETED]


def _interval(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return 1.96 * math.sqrt(variance / len(values))
