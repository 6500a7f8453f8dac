"""What the cells with heads share: a norm per head, and biases of the forget gate.

    y = weight * (h - mean) / sqrt(variance + eps) + bias,   mean and variance over the D values of a head

Letters: N heads, D head width, H = N * D.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadLayerNorm(nn.Module):
    """Normalise each head by itself: a group norm with one group per head.

    Args:
        hidden_size: H.
        num_heads: N.
        bias: whether there is a bias; a weight there always is.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads}: must divide hidden_size={hidden_size}")
        self.num_heads = num_heads
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        """``[..., N, D]`` to ``[..., H]``."""
        y = F.layer_norm(h, h.shape[-1:], eps=self.eps).flatten(-2) * self.weight
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def bias_linspace_init_(bias: Tensor, start: float = 3.0, end: float = 6.0) -> Tensor:
    """Fill ``bias [N]`` with equal steps from ``start`` to ``end``, in place: heads that forget unequally."""
    if bias.dim() != 1:
        raise ValueError(f"bias of shape {list(bias.shape)}, expected one axis")
    return bias.copy_(torch.linspace(start, end, bias.shape[0], dtype=torch.float32))


__all__ = ["MultiHeadLayerNorm", "bias_linspace_init_"]
