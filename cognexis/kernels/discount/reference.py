"""The discounted sum as a loop over time."""

import torch
from torch import Tensor


def discount_reference(start: Tensor, x: Tensor, discounts: Tensor) -> Tensor:
    """See ``discounted_sum``; ``discounts`` broadcasts to ``x``, ``start`` to one step of it."""
    h, outputs = start.expand(x.shape[1:]), []
    for t in range(x.shape[0]):
        h = discounts[t] * h + x[t]
        outputs.append(h)
    return torch.stack(outputs) if outputs else torch.zeros_like(x)
