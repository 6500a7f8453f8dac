"""Halting by predicted gain per cost, for every kind of output."""

import math

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.value_head import ValueHeadScheduler, effective_gain
from tests.batteries.observations import answers, observation

CONTINUE, HALT = ("continue", None), ("halt", "value_gain")


@pytest.mark.parametrize(
    ("gain", "cost", "expected"), [(0.2, 1, CONTINUE), (0.2, 4, HALT), (0.2, 2, CONTINUE), (0.0, 1, HALT)]
)
def test_gain_per_cost_is_compared(gain, cost, expected):
    scheduler = ValueHeadScheduler(gain_threshold=0.1, loop_cost=cost)
    assert answers(scheduler, observation(1, predicted_gain=gain)) == [expected]


def test_nan_gain_continues():
    assert answers(ValueHeadScheduler(), observation(1, predicted_gain=math.nan)) == [CONTINUE]


def test_effective_gain_subtracts_risk_and_time():
    assert effective_gain(0.48, 0.1, 2, risk_weight=0.5, latency_weight=0.1) == pytest.approx(0.23)
    gains = effective_gain(torch.tensor([0.48, 0.0]), torch.tensor([0.1, 1.0]), 2, risk_weight=0.5, latency_weight=0.1)
    torch.testing.assert_close(gains, torch.tensor([0.23, -0.7]))


def test_risk_adjusted_gain_is_compared():
    options = {"output_kind": "risk_adjusted_gain", "risk_weight": 0.5, "latency_weight": 0.1, "loop_cost": 2}
    seen = observation(1, predicted_gain=0.48, uncertainty=0.1)  # (0.48 - 0.05 - 0.2) / 2 = 0.115
    assert answers(ValueHeadScheduler(gain_threshold=0.11, **options), seen) == [CONTINUE]
    assert answers(ValueHeadScheduler(gain_threshold=0.12, **options), seen) == [HALT]


def test_continue_logit_is_compared_as_a_probability():
    scheduler = ValueHeadScheduler(output_kind="continue_logit")
    assert scheduler.gain_threshold == 0.5
    seen = [observation(1, continue_logit=0.1), observation(2, continue_logit=-0.1)]
    assert answers(scheduler, *seen) == [CONTINUE, HALT]


def test_every_loop_may_have_a_threshold_of_its_own():
    scheduler = ValueHeadScheduler(gain_threshold=9.0, loop_thresholds=(0.3, 0.1), loop_cost=2)
    seen = [observation(loop, predicted_gain=0.4) for loop in (1, 2, 3)]  # 0.2 per cost
    assert answers(scheduler, *seen) == [HALT, CONTINUE, CONTINUE]
    assert answers(scheduler, observation(3, predicted_gain=0.18)) == [HALT]
    assert scheduler.to_dict()["loop_thresholds"] == [0.3, 0.1]


@pytest.mark.parametrize("value", [[], [0.1, -1.0], [math.nan], [True], "0.1", 0.1])
def test_thresholds_by_loop_are_checked(value):
    with pytest.raises(InvalidConfigError, match="loop_thresholds="):
        ValueHeadScheduler(loop_thresholds=value)


def test_uncertainty_keeps_a_slot_running():
    scheduler = ValueHeadScheduler(output_kind="uncertainty", gain_threshold=0.3)
    assert answers(scheduler, observation(1, uncertainty=0.4), observation(2, uncertainty=0.2)) == [CONTINUE, HALT]


@pytest.mark.parametrize(
    ("kind", "given", "missing"),
    [
        ("predicted_gain", {"continue_logit": 0.0, "uncertainty": 0.0}, "predicted_gain"),
        ("continue_logit", {"predicted_gain": 0.0}, "continue_logit"),
        ("uncertainty", {"predicted_gain": 0.0}, "uncertainty"),
        ("risk_adjusted_gain", {"uncertainty": 0.0}, "predicted_gain"),
        ("risk_adjusted_gain", {"predicted_gain": 0.0}, "uncertainty"),
    ],
)
def test_another_kind_of_output_is_an_error(kind, given, missing):
    with pytest.raises(InvalidConfigError, match=f"'value_head' needs {missing}, which the observation does not"):
        ValueHeadScheduler(output_kind=kind).observe(observation(1, **given))


def test_defaults():
    scheduler = ValueHeadScheduler()
    assert (scheduler.gain_threshold, scheduler.loop_cost, scheduler.output_kind) == (5e-4, 1.0, "predicted_gain")
    assert scheduler.signals == {"predicted_gain"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loop_cost": 0}, "loop_cost=0: must be a number, finite and above 0"),
        ({"loop_cost": -1}, "loop_cost=-1"),
        ({"loop_cost": math.inf}, "loop_cost=inf"),
        ({"loop_cost": True}, "loop_cost=True"),
        ({"gain_threshold": -1e-4}, "gain_threshold=-0.0001: must be a number, finite and at least 0"),
        ({"gain_threshold": math.nan}, "gain_threshold=nan"),
        ({"output_kind": "predicted_gains"}, "output_kind=.*did you mean 'predicted_gain'"),
        ({"risk_weight": -1, "output_kind": "risk_adjusted_gain"}, "risk_weight=-1"),
        ({"risk_weight": 0.1}, "risk_weight=0.1: needs output_kind='risk_adjusted_gain'"),
        ({"latency_weight": 0.1, "output_kind": "uncertainty"}, "latency_weight=0.1: needs output_kind"),
    ],
)
def test_fields_are_checked(options, message):
    with pytest.raises(InvalidConfigError, match=message):
        ValueHeadScheduler(**options)
