"""The discounted sum with one fused multiply-add per step and a backward of its own.

The adjoint is a discounted sum in the other direction of time:

    s_t = dh_t + d_{t+1} s_{t+1},   dx = s,   dd_t = s_t h_{t-1},   dstart = d_1 s_1
"""

from typing import Any

import torch
from torch import Tensor


def discount_vectorised(start: Tensor, x: Tensor, discounts: Tensor) -> Tensor:
    """See ``discounted_sum``; ``discounts`` broadcasts to ``x``, ``start`` to one step of it."""
    if not x.shape[0]:
        return torch.zeros_like(x)
    return _DiscountedSum.apply(start.expand(x.shape[1:]), x, discounts, False)


class _DiscountedSum(torch.autograd.Function):
    """h_t = d_t h_{t-1} + x_t; ``is_reversed`` runs it from the last step to the first."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, x: Tensor, discounts: Tensor, is_reversed: bool) -> Tensor:
        h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        steps = list(zip(x.unbind(0), discounts.unbind(0), h.unbind(0), strict=True))
        before = start
        for x_t, d_t, h_t in reversed(steps) if is_reversed else steps:
            torch.addcmul(x_t, d_t, before, out=h_t)
            before = h_t
        ctx.save_for_backward(start, discounts, h)
        ctx.is_reversed = is_reversed
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        start, discounts, h = ctx.saved_tensors
        none = torch.zeros_like(discounts[:1])
        shifted = [none, discounts[:-1]] if ctx.is_reversed else [discounts[1:], none]
        s = _DiscountedSum.apply(torch.zeros_like(start), grads[0], torch.cat(shifted), not ctx.is_reversed)
        first = -1 if ctx.is_reversed else 0
        d_discounts = None
        if ctx.needs_input_grad[2]:
            pairs = (s[:-1], h[1:]) if ctx.is_reversed else (s[1:], h[:-1])
            rest = _product_sum(*pairs, discounts[1:].shape)
            edge = (s[first] * start).sum_to_size(discounts[0].shape).unsqueeze(0)
            d_discounts = torch.cat([rest, edge] if ctx.is_reversed else [edge, rest])
        return s[first] * discounts[first], s, d_discounts, None


def _product_sum(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """(a * b).sum_to_size(shape); a single short axis is summed without the whole product in memory."""
    summed = [axis for axis, (size, wanted) in enumerate(zip(a.shape, shape, strict=True)) if size != wanted]
    if len(summed) != 1:
        return (a * b).sum_to_size(shape)
    parts = list(zip(a.unbind(summed[0]), b.unbind(summed[0]), strict=True))
    total = parts[0][0] * parts[0][1]
    for left, right in parts[1:]:
        total = torch.addcmul(total, left, right)
    return total.unsqueeze(summed[0])
