"""One step of the mLSTM recurrence."""

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_EXPONENT = 80.0  # exp(88.8) is the largest in float32


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: tuple[Tensor, Tensor, Tensor], eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Consume one token; everything in one dtype, at least float32.

    Args:
        q, k, v: ``[B, N, D]``; k unscaled.
        i, f: ``[B, N]``.
        state: c ``[B, N, D, D]``, n ``[B, N, D]``, m ``[B, N]``.
    """
    c, n, m = state
    forgotten = F.logsigmoid(f) + m
    m = torch.maximum(forgotten, i)
    keep = (forgotten - m).exp()[..., None]
    written = k * ((i - m).exp() * k.shape[-1] ** -0.5)[..., None]
    c = keep[..., None] * c + written[..., None] * v[..., None, :]
    n = keep * n + written
    floor = (-m).clamp(max=LARGEST_EXPONENT).exp()
    scale = torch.maximum((q * n).sum(-1).abs(), floor) + eps
    return (q[..., None, :] @ c)[..., 0, :] / scale[..., None], (c, n, m)
