"""The losses of the halting signal, by the numbers, and where their gradients go."""

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.looping.value_head import attach_value_head
from cognexis.training.scheduler.depths import run_depths
from cognexis.training.scheduler.losses import (
    calibration_loss,
    combined_loss,
    consistency_loss,
    continue_loss,
    halting_penalty,
    head_values,
    huber_value_loss,
    masked_mean,
)
from cognexis.training.scheduler.rows import DataRow, make_batch
from tests.batteries.tiny import tiny_model


def test_huber_loss_is_square_near_zero_and_linear_beyond():
    near = huber_value_loss(torch.tensor([0.2, 0.0]), torch.tensor([0.2, -0.05]), delta=0.1)
    far = huber_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), delta=0.1)
    assert near.item() == pytest.approx(6.25e-4) and far.item() == pytest.approx(0.095)
    with pytest.raises(InvalidConfigError, match="delta=0: must be finite and positive"):
        huber_value_loss(torch.ones(1), torch.ones(1), delta=0)


def test_continue_loss_is_the_cross_entropy_of_being_worth_it():
    logits, gains = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.2, 0.04, 0.05])
    p = torch.sigmoid(logits)
    expected = -(p[0].log() + (1 - p[1]).log() + (1 - p[2]).log()) / 3
    torch.testing.assert_close(continue_loss(logits, gains, threshold=0.05), expected)


def test_combined_loss_weighs_its_parts():
    parts = torch.tensor(2.0), torch.tensor(0.5), torch.tensor(0.25)
    assert combined_loss(*parts, lambda_value=0.1, lambda_continue=0.4).item() == pytest.approx(2.15)


def test_masked_slots_do_not_count_and_no_slot_gives_zero_with_a_graph():
    values = torch.tensor([1.0, 5.0, float("nan")], requires_grad=True)
    assert masked_mean(values, torch.tensor([True, True, False])).item() == 3.0
    nothing = masked_mean(values, torch.zeros(3, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0 and values.grad.tolist() == [0, 0, 0]


def test_halting_penalty_counts_the_loops_beyond_the_minimum():
    probs = torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.0, 0.0]])
    assert halting_penalty(probs).item() == pytest.approx((0.875 + 2.0) / 2)
    assert halting_penalty(probs, min_loops=2).item() == pytest.approx((0.75 + 1.0) / 2)
    with pytest.raises(InvalidConfigError, match="min_loops=4: must lie between 1 and 3"):
        halting_penalty(probs, min_loops=4)


def test_calibration_loss_is_the_squared_bias_by_loop():
    predictions, gains = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert calibration_loss(predictions, gains).item() == pytest.approx((0.0 + 1.0) / 2)
    mask = torch.tensor([[True, True], [False, True]])
    assert calibration_loss(predictions, gains, mask).item() == pytest.approx((1.0 + 1.0) / 2)


def test_consistency_loss_is_relative_and_teaches_only_the_early_state():
    early, full = torch.tensor([[[1.0, 0.0]]], requires_grad=True), torch.tensor([[[0.0, 2.0]]], requires_grad=True)
    loss = consistency_loss(early, full)
    loss.backward()
    assert loss.item() == pytest.approx(5 / 4) and early.grad.abs().sum() > 0 and full.grad is None


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("is_detached", [True, False])
def test_trunk_is_taught_only_when_it_is_not_detached(kind, is_detached):
    model = tiny_model()
    head = attach_value_head(model, {"kind": kind, "bottleneck_size": 8})
    states = [state.requires_grad_() for state in _states(model)]
    mask = torch.tensor([[True, True, False], [True, True, True]])
    values = head_values(head, states, mask, is_detached=is_detached)
    assert values.shape == ((2, 3, 2) if kind == "token" else (2, 2))
    gains = torch.rand(values.shape)
    loss = combined_loss(
        huber_value_loss(values, gains),
        calibration_loss(values, gains),
        continue_loss(values, gains) + halting_penalty(values.sigmoid()),
        lambda_value=0.5,
        lambda_continue=0.5,
    )
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() and p.grad.any() for p in head.parameters())
    assert [state.grad is None for state in states] == [is_detached] * 2


def _states(model):
    states = []
    rows = [DataRow("a", (5, 6), (6, -100)), DataRow("b", (7, 8, 9), (8, 9, -100))]
    run_depths(model, make_batch(rows, 0), 2, lambda measured: states.append(measured.state))
    return states
