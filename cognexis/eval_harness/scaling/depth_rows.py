"""From a model at one depth to its result rows, failures included.

A depth that fails (a state that is not finite, too little memory, no end in time) becomes rows with ``status``
"failed" and the reason. Where memory is too small for the batch, it is halved, down to one row; the rows say so.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from cognexis.errors import CognexisError
from cognexis.eval_harness.compute import StageFlops, elementwise_flops, matmul_flops
from cognexis.eval_harness.metrics.language import perplexity
from cognexis.eval_harness.metrics.matching import mean_score, standard_error
from cognexis.eval_harness.results import ResultRow, result_row
from cognexis.eval_harness.runner.provenance import hardware
from cognexis.eval_harness.scaling.measure import DepthMeasurement, measure_depth, time_limited
from cognexis.eval_harness.scaling.probes import continue_greedily, probe_depth, repetition_rate
from cognexis.eval_harness.scaling.row_sources import ScalingRows

DIRECTIONS = {
    "negative_log_likelihood": "lower_is_better",
    "perplexity": "lower_is_better",
    "accuracy": "higher_is_better",
}
_PROBED_ROWS, _PROBED_TOKENS = 4, 64
_PROMPT_TOKENS, _NEW_TOKENS = 16, 32


@dataclass(frozen=True)
class DepthRows:
    """What one depth gave.

    Attributes:
        rows: one per metric.
        scores: of single rows of the data, by metric.
        prompts: the same texts at every depth; empty where the data are no text.
        texts: what the model made of them.
    """

    rows: list[ResultRow]
    scores: dict[str, list[float]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def planned_rows(shared: dict[str, Any]) -> list[ResultRow]:
    """The rows of a depth before it is measured, for their identities."""
    return [result_row({**shared, **_metric(name, None, "planned")}) for name in DIRECTIONS]


def shared_fields(model: Any, data: ScalingRows, depth: int) -> dict[str, Any]:
    """What the rows of one depth have in common and follows from model, data and depth."""
    flops = matmul_flops(model.config, data.length, depth)
    return {
        "task_version": data.version,
        "prompt_format": "none",
        "decoding": {},
        "loop_mode": "fixed",
        "loop_count": depth,
        "num_examples": 0,
        "hardware": hardware(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "flops_mean": flops.total / data.length,
        "stage_flops": _per_token(flops, data.length),
        "elementwise_flops_mean": elementwise_flops(model.config, data.length, depth).total / data.length,
        "trained_max_loops": model.config.trained_max_loops,
        "extrapolated": depth > model.config.trained_max_loops,
        "nonstandard_features": list(model.config.nonstandard_features),
    }


def rows_of_depth(
    model: Any,
    data: ScalingRows,
    shared: dict[str, Any],
    *,
    batch_size: int,
    timeout_s: float,
    tokenizer: Any | None = None,
) -> DepthRows:
    """Measure one depth; ``shared`` holds the fields of its rows that are known before."""
    shared = {**shared, "batch_size": batch_size}
    depth = shared["loop_count"]
    try:
        found = measure_depth(model, data.ids, depth, batch_size=batch_size, timeout_s=timeout_s, labels=data.labels)
        with time_limited(model, timeout_s):
            probed, prompts, texts = _probed(model, data, depth, tokenizer)
        mean = mean_score(found.losses)
        values = {
            "negative_log_likelihood": mean,
            "perplexity": perplexity(mean),
            "accuracy": mean_score(found.accuracies),
        }
    except (CognexisError, TimeoutError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) and batch_size > 1:
            return rows_of_depth(
                model, data, shared, batch_size=batch_size // 2, timeout_s=timeout_s, tokenizer=tokenizer
            )
        if not is_out_of_memory(error) and not isinstance(error, (CognexisError, TimeoutError)):
            raise
        detail = f"{type(error).__name__}: {error}"[:500]
        return DepthRows([result_row({**shared, **_metric(name, None, detail)}) for name in DIRECTIONS])
    scores = {"negative_log_likelihood": found.losses, "accuracy": found.accuracies}
    shared |= _measured(found) | probed | {"num_examples": len(data.ids), "non_finite_count": 0}
    made = []
    for name, value in values.items():
        spread = {"standard_error": standard_error(scores[name])} if name in scores else {}
        made.append(result_row({**shared, **_metric(name, value), **spread}))
    return DepthRows(made, scores, prompts, texts)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was too small, of a device or of the machine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _probed(
    model: Any, data: ScalingRows, depth: int, tokenizer: Any | None
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Fields from the probes, and prompts with their continuations."""
    rows = data.spread(_PROBED_ROWS).to(model.device)
    probe = probe_depth(model, rows[:, : min(_PROBED_TOKENS, data.length)], depth)
    fields: dict[str, Any] = {
        "attention_entropies": probe.attention_entropies and [_finite(value) for value in probe.attention_entropies],
        "loop_gain": None if probe.loop_gain is None else _finite(probe.loop_gain),
    }
    start = min(_PROMPT_TOKENS, data.length)
    num_new = min(_NEW_TOKENS, model.config.max_position_embeddings - start)
    if data.labels is not None or num_new < 1:
        return fields, [], []
    continued = continue_greedily(model, rows[:, :start], depth, num_new)
    fields["repetition_rate"] = repetition_rate(continued)
    prompts = [_text(row, tokenizer) for row in rows[:, :start].tolist()]
    return fields, prompts, [_text(row, tokenizer) for row in continued]


def _text(ids: list[int], tokenizer: Any | None) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids))


def _metric(name: str, value: float | None, detail: str = "") -> dict[str, Any]:
    return {
        "metric_name": name,
        "metric_value": value,
        "metric_direction": DIRECTIONS[name],
        "status": "completed" if value is not None else "failed",
        "detail": detail,
    }


def _measured(found: DepthMeasurement) -> dict[str, Any]:
    return {
        "latency_ms_mean": found.latency.mean,
        "latency_ms_p50": found.latency.median,
        "latency_ms_p90": found.latency.p90,
        "latency_ms_p99": found.latency.p99,
        "tokens_per_second": found.tokens_per_second,
        "peak_memory_bytes": found.peak_memory_bytes,
        "hidden_norms": [_finite(norm) for norm in found.norms],
        "hidden_deltas": [None if delta is None else _finite(delta) for delta in found.deltas],
        "prediction_entropy": _finite(max(0.0, found.entropy)),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _per_token(flops: StageFlops, length: int) -> dict[str, float]:
    return {name: value / length for name, value in vars(flops).items()}
