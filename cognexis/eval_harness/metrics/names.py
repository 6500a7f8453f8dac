"""The names of metrics in result files, and which way is better.

Latencies are milliseconds of wall time, ``flops`` are operations per request, memory is bytes, loops are counted per
request. The four depth metrics describe a whole grid of depths; their sign already says better or worse.
"""

from enum import StrEnum


class MetricDirection(StrEnum):
    """Whether a larger value of a metric is better or worse."""

    HIGHER_IS_BETTER = "higher_is_better"
    LOWER_IS_BETTER = "lower_is_better"


class MetricName(StrEnum):
    """Names that stand in rows, summaries and reports."""

    PERPLEXITY = "perplexity"
    NEGATIVE_LOG_LIKELIHOOD = "negative_log_likelihood"
    ACCURACY = "accuracy"
    EXACT_MATCH = "exact_match"
    PASS_AT_K = "pass_at_k"
    LATENCY_MS = "latency_ms"
    PREFILL_LATENCY_MS = "prefill_latency_ms"
    DECODE_LATENCY_MS_PER_TOKEN = "decode_latency_ms_per_token"
    FLOPS = "flops"
    PEAK_MEMORY_BYTES = "peak_memory_bytes"
    LOOPS_MEAN = "loops_mean"
    LOOPS_P50 = "loops_p50"
    LOOPS_P90 = "loops_p90"
    LOOPS_P99 = "loops_p99"
    DEPTH_EFFICIENCY_INDEX = "depth_efficiency_index"
    LOOP_SATURATION_POINT = "loop_saturation_point"
    OVERTHINKING_THRESHOLD = "overthinking_threshold"
    DEPTH_GAIN_RATIO = "depth_gain_ratio"
    BUDGET_EXHAUSTION_RATE = "budget_exhaustion_rate"


HIGHER_IS_BETTER = frozenset(
    {
        MetricName.ACCURACY,
        MetricName.EXACT_MATCH,
        MetricName.PASS_AT_K,
        MetricName.DEPTH_EFFICIENCY_INDEX,
        MetricName.OVERTHINKING_THRESHOLD,
        MetricName.DEPTH_GAIN_RATIO,
    }
)


def metric_direction(name: MetricName) -> MetricDirection:
    """Which way is better for a metric of ours; of two saturation points the smaller costs less."""
    return MetricDirection.HIGHER_IS_BETTER if name in HIGHER_IS_BETTER else MetricDirection.LOWER_IS_BETTER
