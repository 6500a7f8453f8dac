"""The next-token loss: hand example, masks, accumulation, extreme logits, precision, refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from cognexis.decoder.loss import causal_lm_loss
from cognexis.errors import InvalidConfigError, InvalidTokenIdError, ShapeMismatchError


def random_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits ``[2, 6, 7]`` and labels with some positions taken out."""
    labels = torch.randint(0, 7, (2, 6))
    labels[0, 2] = labels[1, 4:] = -100
    return torch.randn(2, 6, 7, dtype=dtype).requires_grad_(), labels


def by_hand(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    total = count = 0.0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            target = int(labels[b, t + 1])
            weight = 1.0 if weights is None else float(weights[b, t + 1])
            if target != -100:
                row = logits[b, t].detach().double()
                total += weight * float(row.logsumexp(-1) - row[target])
                count += weight
    return total / count


def test_hand_example() -> None:
    """Two tokens of a vocabulary of two: probabilities 1/4 and 1/2 of the right token."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [9.0, -9.0]]])
    labels = torch.tensor([[1, 0, 1]])
    expected = (math.log(4) + math.log(2)) / 2
    assert causal_lm_loss(logits, labels, 2).item() == pytest.approx(expected, rel=1e-7)  # float32
    labels[0, 1] = -100
    assert causal_lm_loss(logits, labels, 2).item() == pytest.approx(math.log(2), rel=1e-7)


def test_loss_equals_the_sum_over_positions_written_out() -> None:
    logits, labels = random_case()
    # Float64 sums in another order.
    assert causal_lm_loss(logits, labels, 7).item() == pytest.approx(by_hand(logits, labels), rel=1e-14)


def test_loss_and_gradient_equal_those_of_transformers() -> None:
    logits, labels = random_case(torch.float32)
    twin = logits.detach().clone().requires_grad_()
    ours, theirs = causal_lm_loss(logits, labels, 7), ForCausalLMLoss(twin, labels, 7)
    ours.backward()
    theirs.backward()
    # Ours divides after the sum.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, twin.grad, rtol=1e-5, atol=1e-8)


def test_gradient_is_that_of_finite_differences() -> None:
    logits, labels = random_case()
    assert torch.autograd.gradcheck(lambda x: causal_lm_loss(x, labels, 7), (logits,))


def test_first_label_and_last_logits_play_no_part() -> None:
    logits, labels = random_case()
    loss = causal_lm_loss(logits, labels, 7)
    loss.backward()
    assert torch.equal(logits.grad[:, -1], torch.zeros(2, 7).double())
    labels[:, 0] = 3
    assert torch.equal(causal_lm_loss(logits, labels, 7), loss)


def test_shifted_labels_are_taken_as_they_are() -> None:
    logits, labels = random_case()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = causal_lm_loss(logits, labels, 7)
    assert torch.equal(causal_lm_loss(logits, None, 7, shift_labels=shifted), expected)
    assert torch.equal(causal_lm_loss(logits, torch.zeros_like(labels), 7, shift_labels=shifted), expected)


def test_sum_over_accumulated_batches_equals_one_large_batch() -> None:
    logits, labels = random_case()
    whole = causal_lm_loss(logits, labels, 7)
    targets = (labels[:, 1:] != -100).sum()
    for count in (targets, int(targets)):
        parts = [causal_lm_loss(logits[i : i + 1], labels[i : i + 1], 7, num_items_in_batch=count) for i in (0, 1)]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-14)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_loss_mask_weighs_the_labels() -> None:
    logits, labels = random_case()
    weights = torch.rand(2, 6)
    loss = causal_lm_loss(logits, labels, 7, loss_mask=weights)
    assert loss.item() == pytest.approx(by_hand(logits, labels, weights), rel=1e-6)  # the weights are float32


def test_loss_mask_of_zeros_and_ones_equals_taking_labels_out() -> None:
    logits, labels = random_case()
    mask = torch.tensor([[1, 1, 1, 0, 1, 0], [1, 0, 1, 1, 1, 1]])
    expected = causal_lm_loss(logits, labels.masked_fill(mask == 0, -100), 7)
    for given in (mask, mask.bool(), mask.double()):
        assert causal_lm_loss(logits, labels, 7, loss_mask=given).item() == pytest.approx(expected.item(), rel=1e-14)


def test_position_of_weight_zero_may_have_an_infinite_loss() -> None:
    logits, labels = random_case()
    with torch.no_grad():
        logits[0, 3, labels[0, 4]] = -math.inf
    mask = torch.ones(2, 6)
    mask[0, 4] = 0
    loss = causal_lm_loss(logits, labels, 7, loss_mask=mask)
    loss.backward()
    assert loss.item() == pytest.approx(causal_lm_loss(logits, labels.masked_fill(mask == 0, -100), 7).item())
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weight_that_is_negative_or_not_finite_is_refused(weight: float) -> None:
    logits, labels = random_case()
    mask = torch.ones(2, 6)
    mask[1, 1] = weight
    with pytest.raises(InvalidConfigError, match="loss_mask"):
        causal_lm_loss(logits, labels, 7, loss_mask=mask)


# -- nothing to learn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [{}, {"loss_mask": torch.ones(2, 6)}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}],
    ids=["mean", "weighted", "accumulated", "accumulated tensor"],
)
def test_batch_without_a_target_gives_zero_with_a_graph(more: dict[str, Any]) -> None:
    logits, labels = random_case()
    loss = causal_lm_loss(logits, torch.full_like(labels, -100), 7, **more)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("count", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_accumulation_without_a_single_target_gives_zero_with_a_graph(count: Any) -> None:
    logits, labels = random_case()
    loss = causal_lm_loss(logits, torch.full_like(labels, -100), 7, num_items_in_batch=count)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_loss_mask_of_zeros_gives_zero_with_a_graph() -> None:
    logits, labels = random_case()
    loss = causal_lm_loss(logits, labels, 7, loss_mask=torch.zeros(2, 6))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_single_token_has_no_target() -> None:
    loss = causal_lm_loss(torch.randn(2, 1, 7).requires_grad_(), torch.zeros(2, 1, dtype=torch.long), 7)
    assert loss.item() == 0.0 and loss.requires_grad


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_ten_thousand_give_a_finite_loss(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 3, 4, dtype=dtype)
    logits[..., 0], logits[..., 1] = 1e4, -1e4
    logits.requires_grad_()
    loss = causal_lm_loss(logits, torch.tensor([[0, 0, 1]]), 4)
    loss.backward()
    # Losses 0 and 2e4; bfloat16 knows 1e4 as 9984.
    assert loss.item() == pytest.approx(1e4, rel=2**-8) and logits.grad.isfinite().all()


def test_float64_loss_is_not_rounded_to_float32() -> None:
    logits, labels = random_case()
    loss = causal_lm_loss(logits, labels, 7)
    assert loss.dtype == torch.float64 and loss.item() != loss.float().item()
    shifted = causal_lm_loss(logits + 1e-9 * torch.randn_like(logits), labels, 7)
    assert 0 < abs(shifted.item() - loss.item()) < 1e-7, "a change below float32 resolution shows"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 2, 5000, dtype=dtype)  # a sum of 5000 ones would stall at 256 in bfloat16
    loss = causal_lm_loss(logits, torch.zeros(1, 2, dtype=torch.long), 5000)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(5000), rel=1e-6)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [7, -1, -99, 10**6])
def test_label_outside_the_vocabulary_is_refused(label: int) -> None:
    logits, labels = random_case()
    labels[1, 1] = label
    with pytest.raises(InvalidTokenIdError, match=f"labels: id {label}") as caught:
        causal_lm_loss(logits, labels, 7)
    assert caught.value.token_id == label
    with pytest.raises(InvalidTokenIdError):
        causal_lm_loss(logits, None, 7, shift_labels=labels)


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (12,), (2, 6, 1)])
def test_labels_and_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    logits, labels = random_case()
    with pytest.raises(ShapeMismatchError, match="labels") as caught:
        causal_lm_loss(logits, torch.zeros(shape, dtype=torch.long), 7)
    assert (caught.value.expected, caught.value.actual) == ((2, 6), shape)
    with pytest.raises(ShapeMismatchError, match="loss_mask"):
        causal_lm_loss(logits, labels, 7, loss_mask=torch.ones(shape))


def test_missing_labels_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match="labels"):
        causal_lm_loss(torch.zeros(1, 2, 7), None, 7)
