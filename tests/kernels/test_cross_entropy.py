"""The forms of the softmax loss agree with torch's own, in value and gradient.

Tests of the Triton form run on a GPU, or on any machine under ``TRITON_INTERPRET=1``.
"""

import pytest
import torch
from torch import nn

from cognexis.errors import BackendError, ShapeMismatchError
from cognexis.kernels.cross_entropy import cross_entropy_, triton_kernel
from cognexis.kernels.dispatch import triton_is_usable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(not triton_is_usable(), reason="needs a CUDA device or TRITON_INTERPRET=1")
FORMS = ["vectorised", pytest.param("triton", marks=[pytest.mark.triton, with_triton])]


def problem(positions, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(positions, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    weights = torch.rand(positions, generator=generator) * (torch.rand(positions, generator=generator) < 0.7)
    return [logits.to(DEVICE, dtype), targets.to(DEVICE), weights.to(DEVICE)]


def of_torch(logits, targets, weights):
    """Losses and gradient in float64."""
    exact = logits.double().requires_grad_()
    losses = weights.double() * nn.functional.cross_entropy(exact, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), exact)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("positions, vocabulary", [(1, 1), (3, 2), (5, 37), (2, 512), (3, 1000)])
def test_losses_and_gradient_are_those_of_torch(form, positions, vocabulary, monkeypatch):
    monkeypatch.setattr(triton_kernel, "BLOCK", 256)  # the larger vocabularies take several blocks
    logits, targets, weights = problem(positions, vocabulary)
    losses, gradient = of_torch(logits, targets, weights)
    found = cross_entropy_(logits, targets, weights, form=form)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_gradient_only(form, dtype):
    logits, targets, weights = problem(4, 300, dtype)
    losses, gradient = of_torch(logits, targets, weights)
    found = cross_entropy_(logits, targets, weights, form=form)
    assert found.dtype == torch.float32 and logits.dtype == dtype
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-6)
    # Half a unit in the last place; Triton's interpreter cuts off instead of rounding: a whole one.
    torch.testing.assert_close(
        logits.double(), gradient, rtol=2.0 ** (-7 if dtype == torch.bfloat16 else -10), atol=1e-6
    )


@pytest.mark.parametrize("form", FORMS)
def test_without_gradient_the_logits_stay(form):
    logits, targets, weights = problem(4, 50)
    before = logits.clone()
    losses = cross_entropy_(logits, targets, weights, with_gradient=False, form=form)
    assert torch.equal(logits, before)
    assert torch.equal(losses, cross_entropy_(logits, targets, weights, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_hidden_logits_have_no_share_and_unweighted_positions_none_either(form, monkeypatch):
    monkeypatch.setattr(triton_kernel, "BLOCK", 16)
    logits, targets, weights = problem(5, 40)
    logits[:, :17] = -torch.inf  # all of the first block
    targets.fill_(20)
    weights.fill_(2.0)
    weights[1] = 0.0
    logits[1] = torch.nan
    logits[2, 30] = torch.nan
    logits[3, 20] = 1e4
    expected = of_torch(logits, targets, weights)[0]
    losses = cross_entropy_(logits, targets, weights, form=form)
    assert losses[1] == 0 and not logits[1].any()
    assert losses[2].isnan() and logits[2].isnan().any(), "a row that is not finite must show"
    assert losses[3] == 0 and not logits[3].any()
    torch.testing.assert_close(losses[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    assert not logits[0, :17].any() and logits[0].sum().abs() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_no_positions_give_no_losses(form):
    assert cross_entropy_(*problem(0, 7), form=form).shape == (0,)


@with_triton
@pytest.mark.triton
def test_rows_need_not_follow_each_other():
    logits, targets, weights = problem(3, 24)
    wide = torch.full((3, 40), 7.0, device=DEVICE)
    wide[:, :24] = logits
    found = cross_entropy_(wide[:, :24], targets, weights, form="triton")
    assert torch.equal(found, cross_entropy_(logits, targets, weights, form="triton"))
    assert torch.equal(wide[:, :24], logits) and (wide[:, 24:] == 7.0).all()


@with_triton
@pytest.mark.triton
def test_triton_refuses_what_it_cannot_compute():
    logits, targets, weights = problem(3, 24)
    with pytest.raises(BackendError, match="float64 is wider than it computes"):
        cross_entropy_(logits.double(), targets, weights, form="triton")
    with pytest.raises(BackendError, match="not adjacent"):
        cross_entropy_(logits.T.contiguous().T, targets, weights, form="triton")


def test_shapes_that_differ_are_refused():
    logits, targets, weights = problem(3, 24)
    with pytest.raises(ShapeMismatchError, match=r"targets of shape \[2\], expected \[3\]"):
        cross_entropy_(logits, targets[:2], weights)
    with pytest.raises(ShapeMismatchError, match=r"weights of shape \[1\], expected \[3\]"):
        cross_entropy_(logits, targets, weights[:1])
