"""One program for a position: the log-sum-exp over blocks of the vocabulary, then the gradient over the same blocks.

The sum is kept relative to the largest logit so far, m, and rescaled by exp(m_old - m_new) when a larger one comes.
Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

BLOCK = 8192
_WARPS = 16


def cross_entropy_triton(logits: Tensor, targets: Tensor, weights: Tensor, with_gradient: bool) -> Tensor:
    """See ``cross_entropy_``."""
    positions, vocabulary = logits.shape
    losses = torch.empty(positions, dtype=torch.float32, device=logits.device)
    if positions:
        block = min(BLOCK, triton.next_power_of_2(vocabulary))
        _position[(positions,)](
            logits,
            targets.contiguous(),
            weights.contiguous(),
            losses,
            logits.stride(0),
            vocabulary,
            WITH_GRADIENT=with_gradient,
            BLOCK=block,
            num_warps=max(1, _WARPS * block // BLOCK),
        )
    return losses


if triton is not None:

    @triton.jit
    def _position(
        logits,
        targets,
        weights,
        losses,
        stride,
        vocabulary,
        WITH_GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        position = tl.program_id(0).to(tl.int64)
        row = logits + position * stride
        target = tl.load(targets + position)
        weight = tl.load(weights + position)
        columns = tl.arange(0, BLOCK)
        largest = -float("inf")
        total = 0.0
        at_target = 0.0
        for start in range(0, vocabulary, BLOCK):
            column = start + columns
            z = tl.load(row + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
            # Taken from the block: another thread may overwrite the row before a second load of this value.
            at_target += tl.sum(tl.where(column == target, z, 0.0))
            new = tl.maximum(largest, tl.max(z))
            base = tl.where(new == -float("inf"), 0.0, new)
            total = total * tl.exp(largest - base) + tl.sum(tl.exp(z - base))
            largest = new
        normaliser = tl.where(largest == -float("inf"), 0.0, largest) + tl.log(total)
        tl.store(losses + position, tl.where(weight > 0, weight * (normaliser - at_target), 0.0))
        if WITH_GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                column = start + columns
                z = tl.load(row + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
                gradient = weight * (tl.exp(z - normaliser) - tl.where(column == target, 1.0, 0.0))
                gradient = tl.where(weight > 0, gradient, 0.0)
                tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=column < vocabulary)
