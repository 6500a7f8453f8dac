"""Measured gains, by the numbers."""

import pytest
import torch

from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.training.scheduler.targets import GAIN_TARGETS, DepthMeasures, TargetOptions, gain_targets

LOSSES = torch.tensor([1.0, 0.8, 0.85, 0.2])
NEXT, BEST = TargetOptions(horizon="next"), TargetOptions(horizon="best")


def close(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected))


def test_next_gains_are_differences_of_neighbours():
    close(gain_targets("loss_delta", DepthMeasures(torch.tensor([1.0, 0.8, 0.85])), NEXT), [0.2, -0.05])


def test_best_gains_look_at_every_later_loop():
    close(gain_targets("loss_delta", DepthMeasures(LOSSES), BEST), [0.8, 0.6, 0.65])
    rising = DepthMeasures(torch.tensor([0.1, 0.3, 0.2]))
    close(gain_targets("loss_delta", rising, BEST), [-0.1, 0.1])


def test_every_kind_is_its_formula():
    measures = DepthMeasures(
        losses=LOSSES,
        scores=torch.tensor([0.0, 1.0, 0.0, 1.0]),
        answer_logprobs=torch.tensor([-3.0, -2.0, -2.5, -1.0]),
        risks=torch.tensor([0.0, 0.1, 0.0, 0.4]),
    )
    assert set(GAIN_TARGETS) == {
        *("loss_delta", "accuracy_delta", "answer_logprob_delta"),
        *("binary_continue", "compute_normalized", "safety_adjusted"),
    }
    close(gain_targets("accuracy_delta", measures, NEXT), [1.0, -1.0, 1.0])
    close(gain_targets("accuracy_delta", measures, BEST), [1.0, 0.0, 1.0])
    close(gain_targets("answer_logprob_delta", measures, NEXT), [1.0, -0.5, 1.5])
    close(gain_targets("answer_logprob_delta", measures, BEST), [2.0, 1.0, 1.5])
    close(gain_targets("binary_continue", measures, NEXT), [1.0, 0.0, 1.0])
    close(gain_targets("binary_continue", measures, TargetOptions(threshold=0.7)), [1.0, 0.0, 0.0])
    half = TargetOptions(horizon="next", loop_cost=2.0)
    close(gain_targets("compute_normalized", measures, half), [0.1, -0.025, 0.325])
    rates = [max(0.2 / 2, 0.15 / 4, 0.8 / 6), max(-0.05 / 2, 0.6 / 4), 0.65 / 2]
    close(gain_targets("compute_normalized", measures, TargetOptions(loop_cost=2.0)), rates)
    close(gain_targets("safety_adjusted", measures, TargetOptions("next", risk_weight=0.5)), [0.15, -0.05, 0.45])
    close(gain_targets("safety_adjusted", measures, TargetOptions("best", risk_weight=0.5)), [0.6, 0.4, 0.45])


def test_leading_axes_are_free():
    losses = torch.rand(3, 5, 6)
    for kind in ("loss_delta", "compute_normalized"):
        whole = gain_targets(kind, DepthMeasures(losses))
        single = torch.stack([gain_targets(kind, DepthMeasures(row)) for row in losses.flatten(0, 1)])
        assert torch.equal(whole.flatten(0, 1), single)


def test_faults_are_named():
    with pytest.raises(InvalidConfigError, match=r"target='loss_detla': .*did you mean 'loss_delta'"):
        gain_targets("loss_detla", DepthMeasures(LOSSES))
    with pytest.raises(InvalidConfigError, match="measures.scores: this target needs it"):
        gain_targets("accuracy_delta", DepthMeasures(LOSSES))
    with pytest.raises(ShapeMismatchError, match=r"needs two loops or more, got shape \(1,\)"):
        gain_targets("loss_delta", DepthMeasures(LOSSES[:1]))
    with pytest.raises(InvalidConfigError, match="horizon='far': must be one of next, best"):
        TargetOptions(horizon="far")
    with pytest.raises(InvalidConfigError, match="loop_cost=0: must be finite and positive"):
        TargetOptions(loop_cost=0)
