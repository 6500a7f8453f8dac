"""Floating-point operations of a training step, loops counted.

    forward(L) = prelude + coda + head + L core
    step(L)    = forward(L) + 2 (prelude + coda + head + min(L, backprop_loops) core)

with the stages of B rows of T tokens by the formula of ``cognexis.looping.cost``. All pairs of positions count, masked
ones too, as torch's counter does under eager attention. What activation checkpointing computes again is left out.
Letters: B rows, T tokens, L loops.
"""

from typing import Any

from cognexis.looping.cost import pass_flops


def forward_flops(config: Any, num_tokens: int, length: int, num_loops: int) -> float:
    """Operations of one forward pass.

    Args:
        num_tokens: B T.
        length: T.
    """
    return num_tokens / length * pass_flops(config, length, num_loops, length, length).total


def step_flops(config: Any, num_tokens: int, length: int, num_loops: int) -> float:
    """Operations of one forward and backward pass."""
    with_gradient = num_loops if config.backprop_loops is None else min(num_loops, config.backprop_loops)
    backward = 2.0 * forward_flops(config, num_tokens, length, with_gradient)
    return forward_flops(config, num_tokens, length, num_loops) + backward
