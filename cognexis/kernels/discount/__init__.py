"""A discounted sum over time, the recurrence of the first order that others are made of.

    h_t = d_t * h_{t-1} + x_t,   h_0 = start

Time is the first axis. ``start`` and ``discounts`` that lack axes at the end are given axes of one there; axes of one
are broadcast. A reset is a discount of 0. Sums are taken in at least float32; T = 0 gives an empty result.
"""

import torch
from torch import Tensor

from cognexis.errors import ShapeMismatchError
from cognexis.kernels.discount.reference import discount_reference
from cognexis.kernels.discount.vectorised import discount_vectorised
from cognexis.kernels.dispatch import choose
from cognexis.kernels.precision import no_autocast

_FORMS = {"reference": discount_reference, "vectorised": discount_vectorised}


def discounted_sum(start_state: Tensor, x: Tensor, discounts: Tensor, *, form: str | None = None) -> Tensor:
    """All h_t.

    Args:
        start_state: h_0, of x's shape without time, or broadcast to it.
        x: ``[T, ...]``.
        discounts: ``[T, ...]``, broadcast to x.

    Returns:
        ``[T, ...]`` in x's dtype.

    Raises:
        ShapeMismatchError: the shapes do not broadcast.
    """
    start = start_state.reshape(*start_state.shape, *(1,) * (x.dim() - 1 - start_state.dim()))
    factors = discounts.reshape(*discounts.shape, *(1,) * (x.dim() - discounts.dim()))
    pairs = ("start_state", start, x.shape[1:]), ("discounts", factors, x.shape)
    for name, value, whole in pairs:
        fits = value.dim() == len(whole) and all(a in (1, b) for a, b in zip(value.shape, whole, strict=True))
        if not fits or (name == "discounts" and value.shape[0] != x.shape[0]):
            raise ShapeMismatchError(
                f"discounted_sum: {name} of shape {list(value.shape)} does not broadcast to {list(whole)}"
            )
    dtype = torch.promote_types(torch.promote_types(x.dtype, discounts.dtype), torch.float32)
    chosen = choose("discounted_sum", x, form=form).form
    with no_autocast(x):
        return _FORMS[chosen](start.to(dtype), x.to(dtype), factors.to(dtype)).to(x.dtype)


def discounted_sum_pytorch(start_state: Tensor, x: Tensor, discounts: Tensor) -> Tensor:
    """``discounted_sum``."""
    return discounted_sum(start_state, x, discounts)


__all__ = ["discounted_sum", "discounted_sum_pytorch"]
