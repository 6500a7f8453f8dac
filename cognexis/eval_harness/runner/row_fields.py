"""From what a run gave and took to the rows of a result file.

Quality: every metric of the task, its value the mean of the scores. Cost: a row for each metric of cost that the run
configuration names, and in every row the columns of time, operations and memory. Rows of likelihoods count operations
per token (``flops_per_token``), all others per request (``flops_per_request``); the metric ``flops`` is per request.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cognexis.errors import BackendError
from cognexis.eval_harness.compute import latency_summary
from cognexis.eval_harness.metrics.matching import mean_score
from cognexis.eval_harness.metrics.names import MetricName
from cognexis.eval_harness.runner.encoding import EncodedExample
from cognexis.eval_harness.runner.execution import Execution
from cognexis.eval_harness.runner.loop_run import LoopRun
from cognexis.eval_harness.tasks.protocol import LOWER, Likelihood, Task


def _percentile(percent: int) -> Callable[[Execution], float]:
    return lambda found: float(np.percentile(found.loops, percent))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


COSTS: dict[str, Callable[[Execution], float | int | None]] = {
    MetricName.LATENCY_MS: lambda found: _mean(found.batch_ms),
    MetricName.PREFILL_LATENCY_MS: lambda found: _mean(found.prefill_ms),
    MetricName.DECODE_LATENCY_MS_PER_TOKEN: lambda found: _mean(found.decode_ms),
    MetricName.FLOPS: lambda found: found.flops.total / found.num_requests,
    MetricName.PEAK_MEMORY_BYTES: lambda found: found.peak_memory_bytes,
    MetricName.LOOPS_MEAN: lambda found: _mean(found.loops),
    MetricName.LOOPS_P50: _percentile(50),
    MetricName.LOOPS_P90: _percentile(90),
    MetricName.LOOPS_P99: _percentile(99),
    MetricName.BUDGET_EXHAUSTION_RATE: lambda found: found.exhausted / found.num_requests,
}
"""Metrics of cost, from what a run took; lower is better for all."""


def score_examples(
    task: Task, examples: Sequence[EncodedExample], predictions: Sequence[Any]
) -> list[dict[str, float]]:
    """The metrics of every example.

    Raises:
        BackendError: the task gives a metric that it does not name, or one that is not finite; names the example.
    """
    names = set(task.metrics) - set(task.derived)
    scores = []
    for encoded, prediction in zip(examples, predictions, strict=True):
        given = task.score(prediction, encoded.example)
        for name, value in given.items():
            if name not in names or isinstance(value, bool) or not math.isfinite(value):
                raise BackendError(
                    f"example {encoded.example.id!r}: the task scored {name}={value!r}: must be a finite number of "
                    f"one of {', '.join(sorted(names))}"
                )
        scores.append(dict(given))
    return scores


def by_metric(task: Task, scores: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The scores of every metric that is a mean, over the examples that have it."""
    names = [name for name in task.metrics if name not in task.derived]
    return {name: [score[name] for score in scores if name in score] for name in names}


def quality(task: Task, scores: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Value of every metric of a task; None where no example has it."""
    means = {name: mean_score(values) for name, values in scores.items() if values}
    values: dict[str, float | None] = {name: means.get(name) for name in task.metrics}
    return values | {name: function(means) for name, function in task.derived.items()}


def cost_fields(found: Execution, run: LoopRun, examples: Sequence[EncodedExample]) -> dict[str, Any]:
    """The columns of cost."""
    is_text = isinstance(examples[0].example.request, Likelihood)
    unit = found.num_tokens if is_text else found.num_requests
    fields: dict[str, Any] = {
        "batch_size": found.batch_size,
        "compute_unit": "flops_per_token" if is_text else "flops_per_request",
        "flops_mean": found.flops.total / unit,
        "stage_flops": {name: value / unit for name, value in vars(found.flops).items()},
        "elementwise_flops_mean": None if found.elementwise is None else found.elementwise / unit,
        "prefill_latency_ms_mean": _mean(found.prefill_ms),
        "decode_latency_ms_per_token_mean": _mean(found.decode_ms),
        "peak_memory_bytes": found.peak_memory_bytes,
        "cache_memory_bytes": found.cache_bytes,
        "non_finite_count": 0,
        "hidden_norms": found.norms or None,
        "scheduler_diagnostics": {
            "average_loops_used": _mean(found.loops) or 0.0,
            "loop_count_histogram": found.histogram(),
            "halt_reasons": dict(sorted(found.halts.items())),
            "scheduler_overhead_ms_mean": found.overhead_ms / found.num_requests if run.is_adaptive else None,
            "budget_violation_count": found.violations,
        },
    }
    if found.batch_ms:
        times = latency_summary(found.batch_ms)
        fields |= {
            "latency_ms_mean": times.mean,
            "latency_ms_p50": times.median,
            "latency_ms_p90": times.p90,
            "latency_ms_p99": times.p99,
            "tokens_per_second": found.num_tokens / (math.fsum(found.batch_ms) / 1e3),
        }
    return fields


def metric_fields(name: str, value: float | int | None, direction: str = LOWER, detail: str = "") -> dict[str, Any]:
    """The columns of one metric; with ``detail`` those of a run that failed."""
    return {
        "metric_name": name,
        "metric_value": None if value is None else float(value),
        "metric_direction": direction,
        "status": "failed" if detail else "completed",
        "detail": detail,
    }
