"""The vectorised discounted sum against the loop over time."""

import pytest
import torch

from cognexis.errors import ShapeMismatchError
from cognexis.kernels.discount import discounted_sum, discounted_sum_pytorch

SHAPES = {
    "whole": ((3, 4), (3, 4)),
    "shared discounts": ((3, 4), (1, 4)),
    "short": ((3,), (3,)),
    "scalar start": ((), (3, 4)),
}


@pytest.mark.parametrize("start_shape, discount_shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65])
def test_both_forms_agree_in_output_and_gradients(T, start_shape, discount_shape):
    start = torch.randn(start_shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(T, 3, 4, dtype=torch.float64, requires_grad=True)
    discounts = torch.rand(T, *discount_shape, dtype=torch.float64)
    discounts = (discounts * (discounts > 0.2)).requires_grad_()
    leaves, found = (start, x, discounts), []
    for form in ("reference", "vectorised"):
        h = discounted_sum(start, x, discounts, form=form)
        weight = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
        loss = (h * weight).sum() + sum(value.sum() for value in leaves)
        found.append([h, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients_can_be_differentiated_again():
    values = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in ((2,), (4, 2), (4, 2))]
    assert torch.autograd.gradgradcheck(lambda *args: discounted_sum(*args, form="vectorised"), values)


def test_sixteen_bits_are_summed_in_float32():
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    h = discounted_sum_pytorch(torch.zeros(1), x, torch.ones_like(x))
    assert h.dtype == torch.bfloat16 and h[-1].item() == 4096


def test_shapes_that_do_not_broadcast_are_an_error():
    with pytest.raises(ShapeMismatchError, match="discounts of shape"):
        discounted_sum(torch.zeros(3), torch.zeros(5, 3), torch.zeros(4, 3))
