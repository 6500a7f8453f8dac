"""The vectorised relative attention against one query at a time."""

import pytest
import torch

from cognexis.errors import ShapeMismatchError
from cognexis.kernels.relative_attention import attend_relative, txl_pytorch
from cognexis.kernels.relative_attention import vectorised as vectorised_module

B, N, D = 2, 3, 4


def arguments(T, M):
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((B, N, T, D), (B, N, M + T, D), (B, N, M + T, D), (N, M + T, D))
    ]
    biases = [torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    segments = torch.zeros(B, M + T, dtype=torch.long)
    if M > 1:
        segments[0, : M // 2] = -1
    segments[1] = (torch.rand(M + T) < 0.2).long().cumsum(0)
    return [*tensors, segments, *biases, M, 0.5]


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("M", [0, 1, 7])
@pytest.mark.parametrize("T", [0, 1, 2, 17])
def test_both_forms_agree_in_output_and_gradients(T, M, window, monkeypatch):
    monkeypatch.setattr(vectorised_module, "QUERY_BLOCK", 5)
    given = arguments(T, M)
    inputs = [value for value in given if isinstance(value, torch.Tensor) and value.requires_grad]
    results = []
    for form in ("reference", "vectorised"):
        y = attend_relative(*given, window=window, form=form)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        loss = (y * weight).sum() + sum(value.sum() for value in inputs)
        results.append([y, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_named_function_has_neither_band_nor_dropout():
    given = arguments(6, 5)
    torch.testing.assert_close(txl_pytorch(*given), attend_relative(*given, form="reference"))


def test_what_does_not_fit_is_an_error():
    given = arguments(4, 2)
    given[3] = given[3][:, 1:]
    with pytest.raises(ShapeMismatchError, match="r of shape"):
        attend_relative(*given)
