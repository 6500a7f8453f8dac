"""From runs to results: differences from the baseline with the same seed, and one summary.

A trained variant is compared with the baseline at fixed loops, a switched one with the baseline as it is used. A
difference needs both runs completed. Where a variant halts rows, only last tokens can be compared, so both sides
then use the metric of the last token. ``best_metric_delta`` is the largest over completed experiments.
"""

import math
from collections.abc import Sequence
from typing import Any

from cognexis.eval_harness.ablations.plan import BASELINE, Plan
from cognexis.eval_harness.ablations.records import (
    AblationResult,
    AblationRun,
    AblationStatus,
    ExperimentRecord,
    Method,
)
from cognexis.eval_harness.result_tables import mean_or_none

_WORST_FIRST = (
    AblationStatus.UNSTABLE,
    AblationStatus.FAILED,
    AblationStatus.PLANNED,
    AblationStatus.COMPLETED,
)


def results_of(plan: Plan, runs: Sequence[AblationRun]) -> list[AblationResult]:
    """One result for each experiment of the plan but the baseline."""
    baselines = {run.seed: run for run in runs if run.experiment == BASELINE}
    return [
        result_of(experiment.record, [run for run in runs if run.experiment == experiment.name], baselines)
        for experiment in plan.experiments
        if experiment.name != BASELINE
    ]


def result_of(
    record: ExperimentRecord, runs: Sequence[AblationRun], baselines: dict[int, AblationRun]
) -> AblationResult:
    """What the runs of one experiment say beside the baselines of their seeds."""
    deltas: dict[str, float] = {}
    compute: list[float | None] = []
    by_rows = False
    for run in runs:
        baseline = baselines.get(run.seed)
        if baseline is None or not run.status == baseline.status == AblationStatus.COMPLETED:
            continue
        own, beside = run.compared, baseline.compared if run.method == Method.RETRAINED else baseline.in_use
        assert own is not None
        if beside is None:
            continue
        by_rows = "adaptive_sequence" in (own.loop_mode, beside.loop_mode)
        value, base_value = (point.value(run.metric_name, last=by_rows) for point in (own, beside))
        if value is not None and base_value is not None:
            sign = -1.0 if run.metric_name == "negative_log_likelihood" else 1.0
            deltas[str(run.seed)] = sign * (value - base_value)
        compute.append(own.flops_per_token - beside.flops_per_token)
    states = {run.status for run in runs} or {AblationStatus.PLANNED}
    if len(runs) < len(record.seeds):
        states.add(AblationStatus.PLANNED)
    notes = [f"seed {run.seed}: {run.detail}" for run in runs if run.detail]
    if record.note:
        notes.insert(0, record.note)
    if by_rows:
        notes.append("compared by the last token of each row")
    values = list(deltas.values())
    return AblationResult(
        name=record.name,
        plan=record,
        status=next(status for status in _WORST_FIRST if status in states),
        metric_delta=mean_or_none(values),
        metric_delta_error=_error(values),
        metric_delta_by_seed=deltas,
        compute_delta=mean_or_none(compute),
        non_finite_count=sum(run.non_finite_count for run in runs),
        parameter_count=runs[0].parameter_count if runs else None,
        notes=tuple(notes),
    )


def summarize(results: Sequence[AblationResult]) -> dict[str, Any]:
    """Counts by status and the best difference: ``runs``, one key for each status, ``best_metric_delta``, ``best``."""
    counts = {status.value: sum(result.status == status for result in results) for status in AblationStatus}
    completed = [
        result for result in results if result.status == AblationStatus.COMPLETED and result.metric_delta is not None
    ]
    best = max(completed, key=lambda result: result.metric_delta or 0.0, default=None)
    return {
        "runs": len(results),
        **counts,
        "best_metric_delta": None if best is None else best.metric_delta,
        "best": None if best is None else best.name,
    }


def _error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
