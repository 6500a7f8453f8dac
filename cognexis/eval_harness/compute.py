"""What a request costs: operations by stage, bytes of the cache, and percentiles of measured times.

Matrix products are counted by the formula of ``cognexis.looping.cost``, which agrees within 2 % with torch's own
counter under eager attention. In token mode a row costs what its deepest token costs; ``token_updates`` is the sum of
the tokens' loops, the least that a compacting implementation could do.

Elementwise operations are counted by this table, per element: norm 4, softmax 5, activation 5 (gated: one product
more), rotation 3 (on queries and keys), residual 1 and its scale 1, gate 4 for the sigmoid and 3 for the mixture,
residual injection 2. Cortex layers are left out of this column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cognexis.errors import InvalidConfigError
from cognexis.looping.cost import StageFlops, dense_block_flops, head_flops, pass_flops, token_bytes

__all__ = [
    "LatencySummary",
    "StageFlops",
    "cache_bytes",
    "dense_block_flops",
    "elementwise_flops",
    "generation_flops",
    "head_flops",
    "latency_summary",
    "matmul_flops",
    "token_updates",
]

_ATTENTION = ("full_attention", "sliding_attention")
_GATED = ("swiglu", "geglu")


def matmul_flops(
    config: Any, num_tokens: int, num_loops: int, *, num_keys: int | None = None, head_tokens: int | None = None
) -> StageFlops:
    """Matrix FLOPs of one row in one forward pass, by the formula of ``cognexis.looping.cost``:

        total = prelude blocks + num_loops (core blocks + gate + injection) + coda blocks + head

    Args:
        config: a ``CognexisConfig``.
        num_tokens: tokens that are computed.
        num_loops: loops of the core; in token mode those of the deepest token.
        num_keys: keys in sight of each token; None: ``num_tokens``.
        head_tokens: tokens whose logits are computed; None: all.

    Raises:
        InvalidConfigError: a count is below 1.
    """
    keys = num_tokens if num_keys is None else num_keys
    logits = num_tokens if head_tokens is None else head_tokens
    _check_counts(num_tokens=num_tokens, num_loops=num_loops, num_keys=keys, head_tokens=logits)
    return pass_flops(config, num_tokens, num_loops, keys, logits)


def elementwise_flops(config: Any, num_tokens: int, num_loops: int, *, num_keys: int | None = None) -> StageFlops:
    """Elementwise operations of one row in one forward pass; arguments as ``matmul_flops``."""
    keys = num_tokens if num_keys is None else num_keys
    _check_counts(num_tokens=num_tokens, num_loops=num_loops, num_keys=keys)
    width = config.hidden_size
    stages = {
        stage: sum(_block_elements(config, stage, kind, keys) for kind in config.stage_layer_types(stage))
        for stage in ("prelude", "core", "coda")
    }
    core = stages["core"] + 4 * width * (config.recurrent_norm in ("closing", "sandwich"))
    core += (4 + 4 + 3) * width * bool(config.recurrent_gating)
    core += 2 * width * (config.input_injection == "residual")
    final = 4 * width * (config.final_norm != "none")
    return StageFlops(
        num_tokens * stages["prelude"],
        num_tokens * num_loops * core,
        num_tokens * stages["coda"],
        num_tokens * final,
    )


def generation_flops(config: Any, prompt_tokens: int, loop_counts: Sequence[int]) -> StageFlops:
    """Matrix FLOPs of a request: the prefill yields the first token, and each further token is a pass over one.

    Args:
        prompt_tokens: tokens of the prompt, 1 or more.
        loop_counts: loops of each generated token, in order; the first are those of the prefill.

    Raises:
        InvalidConfigError: no tokens, or a count below 1.
    """
    if not loop_counts:
        raise InvalidConfigError("loop_counts: none given; a request yields one or more tokens")
    total = matmul_flops(config, prompt_tokens, loop_counts[0], head_tokens=1)
    for index, num_loops in enumerate(loop_counts[1:], start=1):
        total += matmul_flops(config, 1, num_loops, num_keys=prompt_tokens + index)
    return total


def token_updates(loop_counts: Sequence[int]) -> int:
    """Loops of all tokens together."""
    _check_counts(**{f"loop_counts[{index}]": count for index, count in enumerate(loop_counts)})
    return sum(loop_counts)


def cache_bytes(config: Any, loop_counts: Sequence[int], itemsize: int) -> int:
    """Bytes of keys and values in an exact cache of tokens with these loops; ``itemsize`` bytes per number."""
    _check_counts(itemsize=itemsize)
    return sum(token_bytes(config, loops, itemsize) for loops in loop_counts)


@dataclass(frozen=True)
class LatencySummary:
    """Milliseconds of ``count`` measurements; percentiles interpolate between neighbours."""

    count: int
    mean: float
    median: float
    p90: float
    p99: float


def latency_summary(milliseconds: Sequence[float]) -> LatencySummary:
    """Mean and percentiles of measured times.

    Raises:
        InvalidConfigError: none given, or one that is negative or not finite.
    """
    times = np.asarray(milliseconds, dtype=np.float64)
    if times.size == 0:
        raise InvalidConfigError("milliseconds: none given; a summary needs one or more measurements")
    if not (np.isfinite(times).all() and (times >= 0).all()):
        wrong = times[~(np.isfinite(times) & (times >= 0))][0].item()
        raise InvalidConfigError(f"milliseconds: {wrong!r} must be a finite number of 0 or more")
    median, p90, p99 = np.percentile(times, (50, 90, 99)).tolist()
    return LatencySummary(times.size, times.mean().item(), median, p90, p99)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InvalidConfigError(f"{name}={count!r}: must be an integer of 1 or more")


def _block_elements(config: Any, stage: str, kind: str, num_keys: int) -> int:
    """Elementwise operations of one token in one block."""
    if kind not in _ATTENTION:
        return 0
    spec, width = config.block_spec(stage), config.hidden_size
    in_sight = num_keys if kind == "full_attention" else min(num_keys, config.sliding_window)
    sandwich = stage == "core" and config.recurrent_norm == "sandwich"
    norms = 4 * width * (4 if sandwich else 2)
    residuals = 2 * width * (2 if stage == "core" else 1)
    rotation = 3 * spec.head_dim * (spec.num_attention_heads + spec.num_key_value_heads)
    activation = spec.intermediate_size * (6 if spec.ffn_activation in _GATED else 5)
    return norms + residuals + rotation + activation + 5 * spec.num_attention_heads * in_sight
