"""Signals against plain float64 formulas, golden values, and the corners of probability 0 and NaN."""

import math

import pytest
import torch

from cognexis.errors import ShapeMismatchError
from cognexis.looping.signals import (
    agreement,
    confidence,
    entropy,
    hidden_delta,
    log_probabilities,
    margin,
    oscillation,
    prediction_change,
    relative_delta,
    row_maximum,
    state_norm,
)


def test_delta_is_the_norm_of_the_change():
    previous, current = torch.zeros(1, 2, 2), torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    assert hidden_delta(current, previous).tolist() == [[5.0, 0.0]]
    assert state_norm(current).tolist() == [[5.0, 0.0]]


def test_relative_delta_divides_by_the_state_before():
    previous, current = torch.tensor([[[0.0, 10.0]]]), torch.tensor([[[3.0, 14.0]]])
    torch.testing.assert_close(relative_delta(current, previous), torch.tensor([[0.5]]))
    assert relative_delta(previous, torch.zeros_like(previous), eps=1.0).item() == 10.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_measured_in_float32(dtype):
    previous = torch.full((1, 1, 64), 256.0, dtype=dtype)
    current = previous + 256
    assert hidden_delta(current, previous).dtype == torch.float32
    assert hidden_delta(current, previous).item() == 2048.0
    assert relative_delta(current * 100, previous).isfinite().all()  # the norm, 409,600, is beyond float16


def test_double_precision_stays():
    states = torch.randn(1, 2, 4, dtype=torch.float64)
    assert relative_delta(states, states + 1).dtype == torch.float64
    assert log_probabilities(states).dtype == torch.float64


def test_oscillation_is_minus_one_for_a_state_that_jumps_back():
    a, b, c = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 2.0]]])
    assert oscillation(a, b, a).item() == -1
    assert oscillation(b * 2, b, a).item() == 1
    assert oscillation(c, b, a).item() == 0
    assert oscillation(a, a, b).item() == 0


def test_uniform_prediction_over_four_tokens():
    log_probs = log_probabilities(torch.zeros(2, 3, 4))
    torch.testing.assert_close(confidence(log_probs), torch.full((2, 3), 0.25))
    torch.testing.assert_close(margin(log_probs), torch.zeros(2, 3))
    torch.testing.assert_close(entropy(log_probs), torch.full((2, 3), math.log(4)))


def test_prediction_signals_equal_their_formulas_in_float64():
    logits, before = torch.randn(2, 5, 11) * 3, torch.randn(2, 5, 11) * 3
    p, q = logits.double().softmax(-1), before.double().softmax(-1)
    sorted_p = p.sort(descending=True).values
    log_p, log_q = log_probabilities(logits), log_probabilities(before)
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}  # float32 against float64
    torch.testing.assert_close(confidence(log_p), p.amax(-1), **tolerance)
    torch.testing.assert_close(margin(log_p), sorted_p[..., 0] - sorted_p[..., 1], **tolerance)
    torch.testing.assert_close(entropy(log_p), -(p * p.log()).sum(-1), **tolerance)
    torch.testing.assert_close(prediction_change(log_q, log_p), (q * (q / p).log()).sum(-1), **tolerance)


def test_huge_logits_and_impossible_tokens_stay_finite():
    log_probs = log_probabilities(torch.tensor([[1e4, -1e4, -torch.inf], [0.0, 0.0, -torch.inf]]))
    assert confidence(log_probs).tolist() == [1.0, 0.5]
    assert margin(log_probs).tolist() == [1.0, 0.0]
    torch.testing.assert_close(entropy(log_probs), torch.tensor([0.0, math.log(2)]))
    torch.testing.assert_close(prediction_change(log_probs, log_probs), torch.zeros(2))


def test_prediction_change_goes_from_the_earlier_to_the_later_prediction():
    sure, unsure = torch.tensor([0.0, -torch.inf]), log_probabilities(torch.zeros(2))
    assert prediction_change(sure, unsure).item() == pytest.approx(math.log(2))
    assert prediction_change(unsure, sure).item() == math.inf


def test_prediction_change_is_never_negative_and_infinite_without_an_earlier_prediction():
    log_probs = log_probabilities(torch.randn(1000, 7))
    assert (prediction_change(log_probs, log_probs + 1e-7) >= 0).all()
    first = prediction_change(None, log_probs)
    assert first.shape == (1000,) and first.isinf().all()


def test_nan_logits_give_nan_signals():
    log_probs = log_probabilities(torch.tensor([[0.0, torch.nan, 1.0]]))
    fine = log_probabilities(torch.zeros(1, 3))
    for signal in (confidence(log_probs), margin(log_probs), entropy(log_probs), prediction_change(fine, log_probs)):
        assert signal.isnan().all()
    assert prediction_change(log_probs, fine).isnan().all()


def test_agreement_counts_loops_that_prefer_the_last_token():
    predictions = torch.tensor([[1, 5], [2, 5], [1, 5], [1, 6]])  # [L, B]
    assert agreement(predictions).tolist() == [0.75, 0.25]


def test_row_maximum_leaves_padding_out():
    values = torch.tensor([[9.0, 1.0, 2.0], [3.0, torch.nan, 1.0], [1.0, 2.0, 3.0]])
    is_real = torch.tensor([[False, True, True], [True, False, True], [False, False, False]])
    assert row_maximum(values, is_real).tolist() == [2.0, 3.0, -math.inf]
    assert row_maximum(values[::2]).tolist() == [9.0, 3.0]
    assert row_maximum(values, torch.ones_like(is_real))[1].isnan()
    with pytest.raises(ShapeMismatchError, match=r"is_real: must have the shape \(3, 3\), got \(3,\)"):
        row_maximum(values, is_real[0])
