"""Floating-point operations of a training step, loops counted.

    forward(L) = prelude + coda + head + L core
    step(L)    = forward(L) + 2 (prelude + coda + head + min(L, backprop_loops) core)

for B rows of T tokens, with

    block = 2 B T (2 H D (N + G) + m H F) + 4 B T S N D      S keys in sight, m = 3 with a gated activation, else 2
    head  = 2 B T H V

A multiplication and an addition count as two operations; all pairs of positions count, masked ones too, as torch's
counter does under eager attention. Norms, activations and rotations are left out, and so is what activation
checkpointing computes again. A layer that is no attention block counts two operations for each parameter and token.
Letters: B rows, T tokens, H width, D head width, N heads, G key/value heads, F feed-forward width, V vocabulary.
"""

from typing import Any

from cognexis.looping.cost import core_flops_per_token

_ATTENTION = ("full_attention", "sliding_attention")


def forward_flops(config: Any, num_tokens: int, length: int, num_loops: int) -> float:
    """Operations of one forward pass.

    Args:
        num_tokens: B T.
        length: T.
    """
    return num_tokens * (_fixed_per_token(config, length) + num_loops * core_flops_per_token(config, length))


def step_flops(config: Any, num_tokens: int, length: int, num_loops: int) -> float:
    """Operations of one forward and backward pass."""
    with_gradient = num_loops if config.backprop_loops is None else min(num_loops, config.backprop_loops)
    backward = 2.0 * forward_flops(config, num_tokens, length, with_gradient)
    return forward_flops(config, num_tokens, length, num_loops) + backward


def _fixed_per_token(config: Any, length: int) -> float:
    """Prelude, coda and head."""
    total = 2.0 * config.hidden_size * config.vocab_size
    for stage in ("prelude", "coda"):
        spec = config.block_spec(stage)
        projections = 2 * config.hidden_size * spec.head_dim * (spec.num_attention_heads + spec.num_key_value_heads)
        matrices = 3 if spec.ffn_activation in ("swiglu", "geglu") else 2
        parameters = projections + matrices * config.hidden_size * spec.intermediate_size
        for layer_type in config.stage_layer_types(stage):
            total += 2.0 * parameters
            if layer_type in _ATTENTION:
                in_sight = length if layer_type == "full_attention" else min(length, config.sliding_window)
                total += 4.0 * spec.num_attention_heads * spec.head_dim * in_sight
    return total
