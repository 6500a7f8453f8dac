"""The Hadamard transform: orthogonal at every width, and the same in both forms."""

import pytest
import torch

from cognexis.errors import ShapeMismatchError
from cognexis.kernels.hadamard import hadamard_transform, srht_pytorch

WIDTHS = [1, 2, 3, 6, 7, 8, 12, 13, 32]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("normalize", [True, False])
def test_both_forms_agree_in_output_and_gradient(width, normalize):
    x = torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True)
    found = []
    for form in ("reference", "vectorised"):
        y = hadamard_transform(x, normalize=normalize, form=form)
        found.append((y, *torch.autograd.grad((y * torch.arange(width)).sum(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("width", WIDTHS)
def test_transform_is_orthogonal(width):
    eye = torch.eye(width, dtype=torch.float64)
    matrix = hadamard_transform(eye)
    torch.testing.assert_close(matrix @ matrix.T, eye)
    torch.testing.assert_close(matrix, matrix.T)


def test_order_is_that_of_sylvester():
    expected = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    torch.testing.assert_close(hadamard_transform(torch.eye(4), normalize=False), expected)


def test_signs_and_permutation_come_first():
    x = torch.randn(2, 3, 6)
    signs, order = torch.tensor([1.0, -1, 1, -1, -1, 1]), torch.tensor([3, 1, 0, 5, 4, 2])
    torch.testing.assert_close(srht_pytorch(x, signs, order), hadamard_transform(x[..., order] * signs))
    torch.testing.assert_close(srht_pytorch(x, signs, None), hadamard_transform(x * signs))
    torch.testing.assert_close(srht_pytorch(x, signs, order).norm(dim=-1), x.norm(dim=-1))


def test_signs_of_another_width_are_an_error():
    with pytest.raises(ShapeMismatchError, match="signs_h of shape"):
        srht_pytorch(torch.zeros(1, 1, 4), torch.ones(3), None)
