"""Rows of an imagined model that gains until 8 loops and then loses, and the scores of its examples."""

import numpy as np

from cognexis.eval_harness.results import result_row

DEPTHS = (1, 2, 4, 8, 12, 16)
LOSSES = (4.1, 3.62, 3.41, 3.37, 3.43, 3.6)
ACCURACIES = (0.31, 0.42, 0.5, 0.52, 0.51, 0.47)


def rows_and_samples(num_examples=60, seeds=(0, 1)):
    """Two metrics at six depths for each seed, an adaptive row, and a failed one."""
    rows, samples = [], {}
    for seed in seeds:
        generator = np.random.default_rng(seed)
        ease = generator.normal(0, 0.3, num_examples)
        for name, means in (("negative_log_likelihood", LOSSES), ("accuracy", ACCURACIES)):
            for depth, mean in zip(DEPTHS, means, strict=True):
                scores = mean + ease + generator.normal(0, 0.05, num_examples)
                if name == "accuracy":
                    scores = (ease + 0.3 * generator.normal(size=num_examples) < 0.6 * mean - 0.3).astype(float)
                row = _row(name, depth, scores, seed)
                rows.append(row)
                samples[row.identity] = scores.tolist()
        rows.append(_row("negative_log_likelihood", 16, np.array([3.39, 3.4]), seed, adaptive=4.6))
    failure = {"metric_value": None, "status": "failed", "detail": "loss is not finite", "standard_error": None}
    rows.append(result_row(_row("accuracy", 32, np.array([0.0]), 0).model_dump() | failure))
    return rows, samples


def _row(name, depth, scores, seed, adaptive=None):
    loops = np.arange(depth + 1)
    latency = 3.0 + 2.0 * depth
    content = {
        "checkpoint": "runs/model",
        "tokenizer_checksum": "sha256:" + "0" * 64,
        "dataset": "held-out text" if name == "negative_log_likelihood" else "multiple choice",
        "split": "validation",
        "task_version": "1",
        "prompt_format": "none",
        "decoding": {},
        "loop_mode": "fixed" if adaptive is None else "adaptive_token",
        "loop_count": depth,
        "metric_name": name,
        "metric_value": float(scores.mean()),
        "metric_direction": "lower_is_better" if name == "negative_log_likelihood" else "higher_is_better",
        "num_examples": len(scores),
        "standard_error": float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None,
        "seed": seed,
        "hardware": "2 cores of an imagined CPU",
        "dtype": "float32",
        "versions": {"torch": "2.13"},
        "flops_mean": 1.1e6 + 0.5e6 * (adaptive or depth),
        "latency_ms_mean": latency,
        "latency_ms_p50": 0.97 * latency,
        "latency_ms_p90": 1.1 * latency,
        "latency_ms_p99": 1.4 * latency,
        "peak_memory_bytes": 50 * 2**20 + depth * 2**20,
        "hidden_norms": (4 + loops + 0.05 * loops**2).tolist(),
        "hidden_deltas": (1.0 / loops[1:]).tolist(),
        "non_finite_count": 0,
        "extrapolated": depth > 8,
    }
    if adaptive is not None:
        content["scheduler_diagnostics"] = {"average_loops_used": adaptive, "loop_count_histogram": [0, 0, 0, 1, 1]}
    return result_row(content)
