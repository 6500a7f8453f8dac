"""What a request costs: operations by stage, bytes of the cache, and percentiles of measured times.

For one row of S tokens that see K keys (K = S where nothing is cached), with H width, N query heads, G key/value
heads, D head width, F feed-forward width, V vocabulary and L loops, the matrix products of a dense block are

    block = 2 S H (N D) + 4 S H (G D) + 2 S (N D) H + 4 N S K D + m S H F      m = 6 with a gated activation, else 4
    head  = 2 S H V
    total = (prelude blocks + L core blocks + coda blocks) block + L (gate + injection) + head

A multiplication and an addition are two operations. Masked pairs of positions count, as eager attention computes
them; a sliding window counts its keys only. A Cortex layer counts two operations per matrix parameter and
token; what mLSTM and XL cells do with their memories is left out. In token mode a row costs what its deepest token
costs; ``token_updates`` is the sum of the tokens' loops, the least that a compacting implementation could do.

Elementwise operations are counted by this table, per element: norm 4, softmax 5, activation 5 (gated: one product
more), rotation 3 (on queries and keys), residual 1 and its scale 1, gate 4 for the sigmoid and 3 for the mixture,
residual injection 2. Cortex layers are left out of this column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cognexis.cortex_layers.layer_settings import layer_cost
from cognexis.errors import InvalidConfigError
from cognexis.looping.cost import core_flops_per_token, token_bytes

_ATTENTION = ("full_attention", "sliding_attention")
_GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class StageFlops:
    """Operations by stage."""

    prelude: int
    recurrent: int
    coda: int
    head: int

    @property
    def total(self) -> int:
        """All stages together."""
        return self.prelude + self.recurrent + self.coda + self.head

    def __add__(self, other: "StageFlops") -> "StageFlops":
        return StageFlops(
            self.prelude + other.prelude,
            self.recurrent + other.recurrent,
            self.coda + other.coda,
            self.head + other.head,
        )


def dense_block_flops(
    num_tokens: int, hidden_size: int, heads: int, kv_heads: int, head_dim: int, intermediate_size: int, *, gated: bool
) -> int:
    """Matrix FLOPs of a transformer block over a row of ``num_tokens`` tokens without a cache."""
    projections = num_tokens * hidden_size * head_dim * (4 * heads + 4 * kv_heads)
    scores = 4 * heads * num_tokens**2 * head_dim
    return projections + scores + (6 if gated else 4) * num_tokens * hidden_size * intermediate_size


def head_flops(num_tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Matrix FLOPs of the language-model head."""
    return 2 * num_tokens * hidden_size * vocab_size


def matmul_flops(
    config: Any, num_tokens: int, num_loops: int, *, num_keys: int | None = None, head_tokens: int | None = None
) -> StageFlops:
    """Matrix FLOPs of one row in one forward pass.

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
    return StageFlops(
        prelude=num_tokens * _fixed_stage_flops(config, "prelude", keys),
        recurrent=num_tokens * num_loops * core_flops_per_token(config, keys)
        + _once_per_pass(config, num_tokens, num_loops),
        coda=num_tokens * _fixed_stage_flops(config, "coda", keys),
        head=head_flops(logits, config.hidden_size, config.vocab_size),
    )


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


def _fixed_stage_flops(config: Any, stage: str, num_keys: int) -> int:
    """Matrix FLOPs of one token in a stage that runs once."""
    spec = config.block_spec(stage)
    matrices = 6 if spec.ffn_activation in _GATED else 4
    projections = 4 * config.hidden_size * spec.head_dim * (spec.num_attention_heads + spec.num_key_value_heads)
    total = 0
    for kind in config.stage_layer_types(stage):
        if kind in _ATTENTION:
            in_sight = num_keys if kind == "full_attention" else min(num_keys, config.sliding_window)
            total += projections + matrices * config.hidden_size * spec.intermediate_size
            total += 4 * spec.num_attention_heads * spec.head_dim * in_sight
        elif kind == "cortex":
            total += 2 * layer_cost(config.cortex, stage, config.hidden_size)[0]
    return total


def _once_per_pass(config: Any, num_tokens: int, num_loops: int) -> int:
    """What ``core_flops_per_token`` counts for each token and is done once per loop, or leaves out and is done once.

    The loop embedding of the gate is projected once per loop; the memory's keys and values once per pass.
    """
    width, spec = config.hidden_size, config.block_spec("core")
    extra = 0
    if config.recurrent_gating and config.gate_loop_embedding:
        extra -= 2 * width * width * (num_tokens - 1) * num_loops
    if config.input_injection == "attention_memory":
        blocks = sum(kind in _ATTENTION for kind in config.stage_layer_types("core"))
        extra += 4 * width * spec.num_key_value_heads * spec.head_dim * num_tokens * blocks
    return extra


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
