"""The formulas of the package as whole-tensor operations."""

import torch
from torch import Tensor


def cross_entropy_vectorised(logits: Tensor, targets: Tensor, weights: Tensor, with_gradient: bool) -> Tensor:
    """See ``cross_entropy_``; ``weights`` has the dtype of the computation."""
    target, share = targets[:, None], weights[:, None]
    wide = logits.to(weights.dtype)
    normaliser = wide.logsumexp(dim=-1, keepdim=True)
    losses = torch.where(share > 0, share * (normaliser - wide.gather(-1, target)), 0)[:, 0]
    if with_gradient:
        gradient = wide.sub_(normaliser).exp_()
        gradient.scatter_add_(-1, target, torch.full_like(share, -1.0))
        logits.copy_(torch.where(share > 0, gradient.mul_(share), 0))
    return losses
