"""The discounted sum with one fused multiply-add per step and a backward of its own.

The adjoint is a discounted sum from the last step to the first:

    s_t = dh_t + d_{t+1} s_{t+1},   dx = s,   dd_t = s_t h_{t-1},   dstart = d_1 s_1
"""

from typing import Any

import torch
from torch import Tensor


def discount_vectorised(start: Tensor, x: Tensor, discounts: Tensor) -> Tensor:
    """See ``discounted_sum``; ``discounts`` broadcasts to ``x``, ``start`` to one step of it."""
    if not x.shape[0]:
        return torch.zeros_like(x)
    return _DiscountedSum.apply(start.expand(x.shape[1:]), x, discounts)


class _DiscountedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, x: Tensor, discounts: Tensor) -> Tensor:
        h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        before = start
        for x_t, d_t, h_t in zip(x.unbind(0), discounts.unbind(0), h.unbind(0), strict=True):
            torch.addcmul(x_t, d_t, before, out=h_t)
            before = h_t
        ctx.save_for_backward(start, discounts, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        start, discounts, h = ctx.saved_tensors
        later = torch.cat([discounts[1:], torch.zeros_like(discounts[:1])]).flip(0)
        s = discount_vectorised(torch.zeros_like(start), grads[0].flip(0), later).flip(0)
        d_discounts = None
        if ctx.needs_input_grad[2]:
            rest = (s[1:] * h[:-1]).sum_to_size(discounts[1:].shape)
            first = (s[0] * start).sum_to_size(discounts[0].shape)
            d_discounts = torch.cat([first.unsqueeze(0), rest])
        return s[0] * discounts[0], s, d_discounts
