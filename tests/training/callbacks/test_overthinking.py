"""Synthetic runs with one fault each."""

import math

import pytest
import torch

from cognexis.errors import ShapeMismatchError
from cognexis.training.callbacks.overthinking import overthinking_signs

STEP = torch.tensor([[[1.0, 0.0]]])


def test_state_that_jumps_back_and_forth_is_flagged():
    jumping = [STEP * (n % 2) for n in range(5)]
    found = overthinking_signs(jumping, torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    assert found.oscillation == pytest.approx(-1.0) and found.oscillates
    assert found.first_harmful_depth is None


def test_state_that_goes_straight_on_is_not_flagged():
    found = overthinking_signs([STEP * n for n in range(5)], torch.ones(5))
    assert found.oscillation == pytest.approx(1.0) and not found.oscillates


def test_first_depth_that_is_worse_than_the_one_before_is_found():
    losses = torch.tensor([3.0, 2.0, 2.05, 2.5])
    states = [STEP] * 4
    assert overthinking_signs(states, losses).first_harmful_depth == 3
    assert overthinking_signs(states, losses, tolerance=0.1).first_harmful_depth == 4
    assert overthinking_signs(states, losses, tolerance=1.0).first_harmful_depth is None


def test_confidence_that_rises_with_the_loss_counts_and_so_does_repetition():
    losses, confidences = torch.tensor([1.0, 2.0, 3.0, 2.0]), torch.tensor([0.1, 0.2, 0.1, 0.3])
    predictions = torch.tensor([[1, 2, 1, 2], [1, 1, 1, 1]])
    found = overthinking_signs([STEP] * 4, losses, confidences, predictions)
    assert found.overconfidence == pytest.approx(1 / 3)
    assert found.repetition == 0.5


def test_two_loops_have_no_oscillation():
    assert math.isnan(overthinking_signs([STEP, STEP], torch.ones(2)).oscillation)


def test_arguments_of_different_depths_are_refused():
    with pytest.raises(ShapeMismatchError, match="states: 3 loops, losses has 2"):
        overthinking_signs([STEP] * 3, torch.ones(2))
