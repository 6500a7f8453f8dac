"""Patience, delay and hysteresis, each against a sequence worked out by hand."""

import math

import pytest
import torch

from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.looping.schedulers.hybrid import HybridScheduler
from cognexis.looping.schedulers.rule_based import RuleBasedScheduler
from cognexis.looping.schedulers.value_head import ValueHeadScheduler
from tests.batteries.observations import answers, context, halts, observation

LOW, HIGH = 0.0, 1.0  # deltas below and above the threshold 0.5


def rule(**options):
    return RuleBasedScheduler(min_delta=0.5, **options)


def test_patience_waits_for_loops_in_a_row():
    deltas = [LOW, LOW, HIGH, LOW, LOW, LOW, LOW]
    assert halts(rule(patience=1), "relative_delta", deltas) == [True, True, False, True, True, True, True]
    assert halts(rule(patience=2), "relative_delta", deltas) == [False, True, False, False, True, True, True]
    assert halts(rule(patience=3), "relative_delta", deltas) == [False, False, False, False, False, True, True]


def test_patience_is_broken_by_nan():
    assert halts(rule(patience=2), "relative_delta", [LOW, math.nan, LOW, LOW]) == [False, False, False, True]


def test_patience_wants_the_same_rule_each_time():
    scheduler = rule(patience=2, confidence_threshold=0.5)
    first, second = {"relative_delta": LOW, "confidence": 0.0}, {"relative_delta": HIGH, "confidence": 1.0}
    seen = [observation(1, **first), observation(2, **second), observation(3, **second)]
    assert answers(scheduler, *seen) == [("continue", None), ("continue", None), ("halt", "confidence")]


def test_patience_counts_loops_below_the_minimum():
    seen = [observation(loops, min_loops=2, relative_delta=LOW) for loops in (1, 2)]
    assert answers(rule(patience=2), *seen) == [("continue", None), ("halt", "min_delta")]


def test_patience_counts_each_slot_by_itself():
    scheduler = rule(patience=2)
    scheduler.observe(observation(1, relative_delta=[LOW, HIGH]))
    assert scheduler.observe(observation(2, relative_delta=[LOW, LOW])).halt.tolist() == [True, False]
    assert scheduler.observe(observation(3, relative_delta=[HIGH, LOW])).halt.tolist() == [False, True]


def test_delay_acts_on_an_earlier_decision():
    deltas = [LOW, HIGH, LOW, LOW, HIGH, HIGH, HIGH]
    assert halts(rule(delay=1), "relative_delta", deltas) == [False, True, False, True, True, False, False]
    assert halts(rule(delay=2), "relative_delta", deltas) == [False, False, True, False, True, True, False]


def test_delay_keeps_the_reason_of_the_decision():
    scheduler = rule(delay=1, confidence_threshold=0.5)
    sure, resting = {"relative_delta": HIGH, "confidence": 1.0}, {"relative_delta": LOW, "confidence": 0.0}
    seen = [observation(1, **sure), observation(2, **resting), observation(3, **sure)]
    assert answers(scheduler, *seen) == [("continue", None), ("halt", "confidence"), ("halt", "min_delta")]


def test_delay_does_not_hold_up_the_hard_rules():
    seen = [observation(1, relative_delta=HIGH, remaining_loops=0), observation(8, relative_delta=HIGH)]
    assert answers(rule(delay=3), *seen) == [("halt", "budget"), ("halt", "max_loops")]


def test_hysteresis_holds_until_the_looser_threshold():
    # Threshold 0.5, looser threshold 0.75: 0.7 holds only after something that held; 0.75 is not below it.
    deltas = [0.7, 0.4, 0.7, 0.74, 0.75, 0.7, 0.4, 0.8, 0.7]
    expected = [False, True, True, True, False, False, True, False, False]
    assert halts(rule(hysteresis=0.5), "relative_delta", deltas) == expected
    assert halts(rule(), "relative_delta", deltas) == [delta < 0.5 for delta in deltas]


def test_hysteresis_of_a_threshold_from_below_goes_down():
    # Threshold 0.9, looser threshold 0.9 / 1.5 = 0.6.
    scheduler = RuleBasedScheduler(min_delta=0, confidence_threshold=0.9, hysteresis=0.5)
    expected = [False, True, True, False, False]
    assert halts(scheduler, "confidence", [0.8, 0.95, 0.61, 0.59, 0.8]) == expected


def test_hysteresis_belongs_to_each_comparison():
    # The gain held before, the change did not: near its threshold the change still has to come below.
    scheduler = HybridScheduler(min_delta=0.5, gain_threshold=0.5, confidence_threshold=None, hysteresis=0.5)
    seen = [
        observation(1, relative_delta=0.7, predicted_gain=0.4),
        observation(2, relative_delta=0.7, predicted_gain=0.7),
        observation(3, relative_delta=0.4, predicted_gain=0.7),
    ]
    assert [action for action, _ in answers(scheduler, *seen)] == ["continue", "continue", "halt"]


def test_patience_delay_and_hysteresis_work_together():
    # holds with hysteresis: -, x, x, x, -; two running: -, -, x, x, -; acted on one loop later: -, -, -, x, x
    scheduler = rule(patience=2, delay=1, hysteresis=0.5)
    expected = [False, False, False, True, True]
    assert halts(scheduler, "relative_delta", [0.7, 0.4, 0.7, 0.7, 0.8]) == expected


@pytest.mark.parametrize("options", [{"patience": 2}, {"delay": 1}, {"hysteresis": 0.5}])
def test_a_new_pass_request_or_finish_starts_without_memory(options):
    scheduler = rule(**options)
    fresh = scheduler.observe(observation(1, relative_delta=0.7)).halt.item()
    for forget in (lambda: None, lambda: scheduler.begin_request(context()), scheduler.finish):
        scheduler.observe(observation(1, relative_delta=LOW))
        forget()
        assert scheduler.observe(observation(1, relative_delta=0.7)).halt.item() == fresh is False


@pytest.mark.parametrize("options", [{"patience": 2}, {"delay": 1}, {"hysteresis": 0.5}])
@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_selected_rows_keep_their_memory(options, rows):
    first, second = torch.tensor([[0.1], [0.9], [0.6]]), torch.tensor([[0.6], [0.1], [0.3]])
    whole, part = rule(**options), rule(**options)
    whole.observe(observation(1, relative_delta=first))
    part.observe(observation(1, relative_delta=first))
    part.select(rows)
    expected = whole.observe(observation(2, relative_delta=second)).halt[rows]
    assert torch.equal(part.observe(observation(2, relative_delta=second[rows])).halt, expected)


@pytest.mark.parametrize("options", [{"patience": 2}, {"delay": 1}, {"hysteresis": 0.5}])
def test_slots_that_change_unannounced_are_refused(options):
    scheduler = rule(**options)
    scheduler.observe(observation(1, relative_delta=[LOW, LOW]))
    with pytest.raises(ShapeMismatchError, match="call select"):
        scheduler.observe(observation(2, relative_delta=[LOW]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience=0: must be an integer of at least 1"),
        ({"patience": True}, "patience=True"),
        ({"patience": 1.0}, "patience=1.0"),
        ({"delay": -1}, "delay=-1: must be an integer of at least 0"),
        ({"delay": None}, "delay=None"),
        ({"hysteresis": -0.1}, "hysteresis=-0.1: must be a number, finite and at least 0"),
        ({"hysteresis": math.inf}, "hysteresis=inf"),
        ({"hysteresis": False}, "hysteresis=False"),
    ],
)
@pytest.mark.parametrize("cls", [RuleBasedScheduler, ValueHeadScheduler, HybridScheduler])
def test_options_are_checked(cls, options, message):
    with pytest.raises(InvalidConfigError, match=message):
        cls(**options)
