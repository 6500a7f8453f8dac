"""The chunked loss is the plain loss, value and gradients, and never holds all logits."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from cognexis.decoder.loss import causal_lm_loss
from cognexis.errors import InvalidConfigError, InvalidTokenIdError, ShapeMismatchError
from cognexis.training.losses.linear_cross_entropy import chunked_causal_lm_loss

B, T, H, V = 3, 11, 8, 37


def problem(dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    hidden = torch.randn(B, T, H, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 4:7] = -100
    return hidden, head, labels


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


@pytest.mark.parametrize("chunk_size", [1, 5, 7, 33, 1000, None])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_the_plain_loss(chunk_size, bias):
    hidden, head, labels = problem(bias=bias)
    for extra in ({}, {"num_items_in_batch": 50}, {"loss_mask": torch.rand(B, T)}, {"shift_labels": labels}):
        plain = causal_lm_loss(head(hidden), labels, V, **extra)
        chunked = chunked_causal_lm_loss(hidden, head, labels, chunk_size=chunk_size, **extra)
        assert chunked.item() == pytest.approx(plain.item(), rel=1e-7)  # a float32 mask counts the targets
        found, expected = gradients(3 * chunked, hidden, head), gradients(3 * plain, hidden, head)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_gradients_match_finite_differences():
    hidden, head, labels = problem()
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_causal_lm_loss(h, _with_weight(head, w), labels, chunk_size=4),
        (hidden, head.weight.detach().requires_grad_()),
    )


class _with_weight:
    def __init__(self, head, weight):
        self.weight, self.bias, self.out_features = weight, head.bias.detach(), head.out_features


def test_batch_without_targets_gives_a_zero_with_a_graph():
    hidden, head, _ = problem()
    loss = chunked_causal_lm_loss(hidden, head, torch.full((B, T), -100))
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, head))


def test_position_without_weight_stays_out_even_where_it_is_not_finite():
    hidden, head, labels = problem(dtype=torch.float32)
    with torch.no_grad():
        hidden[0, 5] = float("nan")  # its target, the label at 6, is -100
    loss = chunked_causal_lm_loss(hidden, head, labels, chunk_size=5)
    assert torch.isfinite(loss)


def test_large_logits_stay_finite():
    hidden, head, labels = problem(dtype=torch.float32)
    loss = chunked_causal_lm_loss(hidden * 1e4, head, labels)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients(loss, hidden, head))


def test_autocast_uses_its_dtype_and_gradients_keep_that_of_the_weights():
    hidden, head, labels = problem(dtype=torch.float32)
    exact = chunked_causal_lm_loss(hidden, head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_causal_lm_loss(hidden, head, labels)
    assert loss.dtype == torch.float32 and loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)  # eight bits of mantissa
    assert [g.dtype for g in gradients(loss, hidden, head)] == [torch.float32] * 3


class _LargestResult(TorchDispatchMode):
    """Remembers the most elements that an operation returned."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.most = max(self.most, value.numel())
        return result


def test_no_tensor_of_all_logits_exists_or_is_kept():
    generator = torch.Generator().manual_seed(0)
    head, hidden = nn.Linear(4, 500, bias=False), torch.randn(4, 64, 4, generator=generator).requires_grad_()
    labels = torch.randint(0, 500, (4, 64), generator=generator)
    kept = []
    with _LargestResult() as watch, saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_causal_lm_loss(hidden, head, labels, chunk_size=8).backward()
    assert watch.most == 8 * 500  # a chunk's logits; all of them would be 256 * 500
    assert max(kept) <= 500 * 4


def test_inputs_that_do_not_fit_are_refused():
    hidden, head, labels = problem()
    with pytest.raises(ShapeMismatchError, match=r"labels must have shape \(3, 11\)"):
        chunked_causal_lm_loss(hidden, head, labels[:, 1:])
    with pytest.raises(InvalidTokenIdError, match="id 37"):
        chunked_causal_lm_loss(hidden, head, torch.full((B, T), 37))
    with pytest.raises(InvalidConfigError, match="chunk_size=0: must be a positive integer"):
        chunked_causal_lm_loss(hidden, head, labels, chunk_size=0)
    with pytest.raises(InvalidConfigError, match="loss_mask: weights must be finite"):
        chunked_causal_lm_loss(hidden, head, labels, loss_mask=torch.full((B, T), -1.0))
