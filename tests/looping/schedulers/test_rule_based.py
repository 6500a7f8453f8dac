"""Thresholds on measured signals: each rule, its strictness and its place in the order."""

import math

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.base import reason_name
from cognexis.looping.schedulers.rule_based import RuleBasedScheduler
from tests.batteries.observations import answers, observation

ALL_ON = {"min_delta": 0.5, "confidence_threshold": 0.5, "entropy_threshold": 0.5, "kl_threshold": 0.5}
AWAKE = {"relative_delta": 1.0, "confidence": 0.0, "entropy": 1.0, "prediction_change": 1.0}


@pytest.mark.parametrize(
    ("signal", "value", "reason"),
    [
        ("relative_delta", 0.4, "min_delta"),
        ("prediction_change", 0.4, "min_delta"),
        ("confidence", 0.6, "confidence"),
        ("entropy", 0.4, "confidence"),
    ],
)
def test_each_signal_halts_by_itself(signal, value, reason):
    scheduler = RuleBasedScheduler(**ALL_ON)
    assert answers(scheduler, observation(1, **AWAKE)) == [("continue", None)]
    assert answers(scheduler, observation(1, **AWAKE | {signal: value})) == [("halt", reason)]


@pytest.mark.parametrize("signal", AWAKE)
def test_a_tie_continues(signal):
    assert answers(RuleBasedScheduler(**ALL_ON), observation(1, **AWAKE | {signal: 0.5})) == [("continue", None)]


@pytest.mark.parametrize("signal", AWAKE)
def test_nan_never_halts(signal):
    scheduler = RuleBasedScheduler(**ALL_ON, hysteresis=0.5)
    resting = {"relative_delta": 0.0, "confidence": 1.0, "entropy": 0.0, "prediction_change": 0.0}
    nan = observation(2, **AWAKE | {signal: math.nan})
    assert answers(scheduler, nan) == [("continue", None)]
    assert answers(scheduler, observation(1, **AWAKE | {signal: resting[signal]}), nan)[1] == ("continue", None)


def test_delta_comes_before_confidence():
    seen = observation(1, relative_delta=[0.0, 1.0], confidence=[1.0, 1.0])
    decision = RuleBasedScheduler(confidence_threshold=0.5).observe(seen)
    assert [reason_name(code) for code in decision.reasons.tolist()] == ["min_delta", "confidence"]


def test_absolute_delta_reads_the_other_signal():
    scheduler = RuleBasedScheduler(min_delta=2.0, delta_kind="absolute")
    assert scheduler.signals == {"hidden_delta"}
    assert answers(scheduler, observation(1, hidden_delta=1.9)) == [("halt", "min_delta")]


def test_only_rules_that_are_on_need_signals():
    assert RuleBasedScheduler().signals == {"relative_delta"}
    assert RuleBasedScheduler(min_delta=0, kl_threshold=1e-3).signals == {"prediction_change"}
    assert RuleBasedScheduler(**ALL_ON).signals == set(AWAKE)
    off = RuleBasedScheduler(min_delta=0)
    assert answers(off, observation(1), observation(8)) == [("continue", None), ("halt", "max_loops")]


def test_defaults_are_relative_and_three_per_cent():
    scheduler = RuleBasedScheduler()
    assert scheduler.to_dict() == {
        "type": "rule_based",
        "min_delta": 0.03,
        "delta_kind": "relative",
        "confidence_threshold": None,
        "entropy_threshold": None,
        "kl_threshold": None,
        "patience": 1,
        "delay": 0,
        "hysteresis": 0.0,
    }


def test_a_missing_signal_is_an_error():
    with pytest.raises(InvalidConfigError, match="'rule_based' needs relative_delta"):
        RuleBasedScheduler().observe(observation(1, confidence=torch.zeros(2)))


def test_thresholds_are_not_rounded_to_half_precision():
    seen = observation(1, relative_delta=1.0, confidence=torch.tensor(0.9531, dtype=torch.bfloat16))
    assert answers(RuleBasedScheduler(confidence_threshold=0.952), seen) == [("halt", "confidence")]


@pytest.mark.parametrize("name", ["min_delta", "confidence_threshold", "entropy_threshold", "kl_threshold"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "0.1", 10**400])
def test_thresholds_are_finite_and_not_negative(name, value):
    with pytest.raises(InvalidConfigError, match=f"{name}=.*must be a number"):
        RuleBasedScheduler(**{name: value})


def test_ranges_and_choices_are_checked():
    with pytest.raises(InvalidConfigError, match=r"confidence_threshold=1.5: must be a number in \[0, 1\]"):
        RuleBasedScheduler(confidence_threshold=1.5)
    with pytest.raises(InvalidConfigError, match="delta_kind='relativ'.*did you mean 'relative'"):
        RuleBasedScheduler(delta_kind="relativ")
    with pytest.raises(InvalidConfigError, match="min_delta=None"):
        RuleBasedScheduler(min_delta=None)
