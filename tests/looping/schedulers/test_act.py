"""The ponder penalty and its three tests, none of them strict."""

import math

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.act import ActScheduler
from tests.batteries.observations import answers, halts, observation

CONTINUE, HALT = ("continue", None), ("halt", "value_gain")
GOLDEN = {"halting_threshold": 0.6, "gain_threshold": 0.01, "ponder_cost": 0.02, "uncertainty_limit": 0.9}


def test_golden_pair():
    scheduler = ActScheduler(**GOLDEN)
    first = observation(1, predicted_gain=0.2, continue_logit=4.0)
    second = observation(2, predicted_gain=0.02, continue_logit=-4.0)
    assert answers(scheduler, first, second) == [CONTINUE, HALT]
    diagnostics = ActScheduler(**GOLDEN).observe(first).diagnostics
    assert diagnostics["ponder_penalty"] == pytest.approx(0.04)
    assert diagnostics["effective_gain"].item() == pytest.approx(0.16)
    assert diagnostics["halt_probability"].item() == pytest.approx(1 / (1 + math.exp(4)))


@pytest.mark.parametrize(
    ("gain", "logit", "uncertainty", "expected"),
    [
        (9.0, 9.0, 0.0, CONTINUE),
        (9.0, -9.0, 0.0, HALT),
        (9.0, 0.0, 0.0, HALT),  # sigmoid(0) = 0.5 reaches the threshold
        (0.5, 9.0, 0.0, HALT),  # 0.5 - 0.125 * 2 = 0.25 reaches the threshold
        (0.51, 9.0, 0.0, CONTINUE),
        (9.0, 9.0, 0.75, HALT),  # reaches the limit
        (9.0, 9.0, 0.74, CONTINUE),
        (math.nan, 9.0, 0.0, CONTINUE),
        (9.0, math.nan, 0.0, CONTINUE),
        (9.0, 9.0, math.nan, CONTINUE),
    ],
)
def test_each_test_halts_by_itself(gain, logit, uncertainty, expected):
    scheduler = ActScheduler(gain_threshold=0.25, ponder_cost=0.125, uncertainty_limit=0.75)
    seen = observation(1, predicted_gain=gain, continue_logit=logit, uncertainty=uncertainty)
    assert answers(scheduler, seen) == [expected]


def test_pondering_gets_dearer_with_every_loop():
    scheduler = ActScheduler(ponder_cost=0.1, gain_threshold=0)
    assert halts(scheduler, "predicted_gain", [0.35] * 4, continue_logit=9.0) == [False, False, True, True]


def test_risk_lowers_the_gain():
    seen = observation(1, predicted_gain=0.5, continue_logit=9.0, uncertainty=0.4)
    decision = ActScheduler(ponder_cost=0, risk_weight=0.5).observe(seen)
    torch.testing.assert_close(decision.diagnostics["effective_gain"], torch.tensor(0.3))
    with pytest.raises(InvalidConfigError, match="'act' needs uncertainty"):
        ActScheduler(risk_weight=0.5).observe(observation(1, predicted_gain=0.5, continue_logit=9.0))


def test_hysteresis_loosens_all_three():
    options = {"ponder_cost": 0, "gain_threshold": 0.2, "hysteresis": 1.0}
    calm = {"continue_logit": 9.0, "uncertainty": 0.0}
    assert halts(ActScheduler(**options), "predicted_gain", [0.3, 0.2, 0.4, 0.41], **calm) == [
        False,
        True,
        True,
        False,
    ]
    calm = {"continue_logit": 9.0, "predicted_gain": 9.0}
    limits = [0.6, 0.95, 0.475, 0.47]
    assert halts(ActScheduler(hysteresis=1.0), "uncertainty", limits, **calm) == [False, True, True, False]


def test_a_head_with_one_output_suffices():
    settings = {"ponder_cost": 0.1, "gain_threshold": 0.05}
    assert halts(ActScheduler(**settings), "predicted_gain", [0.3, 0.3, 0.3]) == [False, True, True]
    assert halts(ActScheduler(**settings), "continue_logit", [0.1, -0.1]) == [False, True]
    with pytest.raises(InvalidConfigError, match="'act' needs continue_logit"):
        ActScheduler().observe(observation(1, uncertainty=0.0))


def test_defaults():
    scheduler = ActScheduler()
    values = scheduler.halting_threshold, scheduler.gain_threshold, scheduler.ponder_cost, scheduler.uncertainty_limit
    assert values == (0.5, 5e-4, 0.01, 0.95)
    assert scheduler.signals == {"predicted_gain"}


@pytest.mark.parametrize("name", ["halting_threshold", "gain_threshold", "ponder_cost", "uncertainty_limit"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, True, None])
def test_fields_are_checked(name, value):
    with pytest.raises(InvalidConfigError, match=f"{name}="):
        ActScheduler(**{name: value})
    with pytest.raises(InvalidConfigError, match=r"halting_threshold=1.1: must be a number in \[0, 1\]"):
        ActScheduler(halting_threshold=1.1)
