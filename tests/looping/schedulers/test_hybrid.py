"""The order of the hybrid rules."""

import math

import pytest

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.hybrid import HybridScheduler
from tests.batteries.observations import answers, observation

CONTINUE = ("continue", None)
OPTIONS = {"min_delta": 0.1, "large_delta": 5.0, "confidence_threshold": 0.9, "gain_threshold": 0.2}
FURTHER = {"high_conf_gain_threshold": 0.4, "loop_cost": 2.0}


def seen(delta, confidence, gain, loops=1):
    return observation(loops, relative_delta=delta, confidence=confidence, predicted_gain=gain)


def test_golden_pair():
    assert answers(HybridScheduler(), seen(10.0, 0.1, 1.0, loops=0)) == [CONTINUE]
    assert answers(HybridScheduler(), seen(0.0, 0.99, 0.0)) == [("halt", "value_gain")]


@pytest.mark.parametrize(
    ("delta", "confidence", "gain", "expected", "with_fallthrough"),
    [
        # (a) a large change continues, whatever else is seen
        (6.0, 1.0, 0.0, None, None),
        (5.0, 1.0, 0.0, "confidence", "confidence"),  # not above large_delta
        # (b) at rest and nothing to gain
        (0.05, 0.0, 0.1, "value_gain", "value_gain"),
        (0.05, 1.0, 0.1, "value_gain", "value_gain"),  # before (c)
        (0.1, 0.0, 0.1, None, "value_gain"),  # a tie of the change
        (0.05, 0.0, 0.2, None, "value_gain"),  # a tie of the gain
        # (c) sure and little to gain
        (1.0, 0.95, 0.3, "confidence", "confidence"),
        (1.0, 0.95, 0.4, None, None),  # a tie of the gain; 0.4 / 2 is not below 0.2
        (1.0, 0.95, 0.5, None, None),
        (1.0, 0.85, 0.3, None, "value_gain"),  # 0.3 / 2 < 0.2
        # (d) gain per cost, with gain_fallthrough only
        (1.0, 0.0, 0.39, None, "value_gain"),
        (1.0, 0.0, 0.41, None, None),
        # NaN never halts by its own rule
        (math.nan, 0.0, 0.5, None, None),
        (math.nan, 0.95, 0.3, "confidence", "confidence"),
        (0.0, math.nan, 0.5, None, None),
        (0.0, 1.0, math.nan, None, None),
    ],
)
def test_order_of_the_rules(delta, confidence, gain, expected, with_fallthrough):
    for fallthrough, reason in ((False, expected), (True, with_fallthrough)):
        scheduler = HybridScheduler(**OPTIONS, **FURTHER, gain_fallthrough=fallthrough)
        wanted = ("halt", reason) if reason else CONTINUE
        assert answers(scheduler, seen(delta, confidence, gain)) == [wanted], fallthrough


def test_defaults():
    scheduler = HybridScheduler()
    assert (scheduler.min_delta, scheduler.delta_kind, scheduler.large_delta) == (0.03, "relative", None)
    assert (scheduler.confidence_threshold, scheduler.gain_threshold, scheduler.loop_cost) == (0.95, 5e-4, 1.0)
    assert scheduler.gain_fallthrough is False
    assert scheduler.signals == {"relative_delta", "confidence", "predicted_gain"}


def test_gain_of_sure_tokens_defaults_to_the_gain_threshold():
    scheduler = HybridScheduler(gain_threshold=0.2)
    assert answers(scheduler, seen(1.0, 0.99, 0.19), seen(1.0, 0.99, 0.2, loops=2)) == [
        ("halt", "confidence"),
        CONTINUE,
    ]


def test_without_a_confidence_threshold_no_prediction_is_needed():
    scheduler = HybridScheduler(confidence_threshold=None, delta_kind="absolute")
    assert scheduler.signals == {"hidden_delta", "predicted_gain"}
    assert answers(scheduler, observation(1, hidden_delta=0.0, predicted_gain=0.0)) == [("halt", "value_gain")]


def test_a_large_change_breaks_patience():
    scheduler = HybridScheduler(**OPTIONS, patience=2)
    sequence = [seen(1.0, 1.0, 0.0), seen(6.0, 1.0, 0.0, 2), seen(1.0, 1.0, 0.0, 3), seen(1.0, 1.0, 0.0, 4)]
    assert answers(scheduler, *sequence) == [CONTINUE, CONTINUE, CONTINUE, ("halt", "confidence")]


@pytest.mark.parametrize("missing", ["relative_delta", "confidence", "predicted_gain"])
def test_every_signal_is_needed(missing):
    given = {name: 0.0 for name in ("relative_delta", "confidence", "predicted_gain") if name != missing}
    with pytest.raises(InvalidConfigError, match=f"'hybrid' needs {missing}"):
        HybridScheduler().observe(observation(1, **given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"large_delta": 0.03}, "large_delta=0.03: must be above min_delta=0.03"),
        ({"large_delta": math.inf}, "large_delta=inf: must be a number"),
        ({"confidence_threshold": 1.1}, r"confidence_threshold=1.1: must be a number in \[0, 1\]"),
        ({"gain_threshold": None}, "gain_threshold=None"),
        ({"high_conf_gain_threshold": -1}, "high_conf_gain_threshold=-1"),
        (
            {"high_conf_gain_threshold": 0.1, "confidence_threshold": None},
            "high_conf_gain_threshold=0.1: needs a confidence_threshold",
        ),
        ({"loop_cost": 0}, "loop_cost=0: must be a number, finite and above 0"),
        ({"gain_fallthrough": 1}, "gain_fallthrough=1: must be True or False"),
        ({"delta_kind": "l2"}, "delta_kind='l2': must be one of relative, absolute"),
    ],
)
def test_fields_are_checked(options, message):
    with pytest.raises(InvalidConfigError, match=message):
        HybridScheduler(**options)
