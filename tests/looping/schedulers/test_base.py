"""Reasons, context, observation, decision, and the record that every scheduler keeps of a request."""

import dataclasses
import json
import math

import pytest
import torch

from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.looping.schedulers.base import (
    HALT_REASONS,
    NO_REASON,
    LoopDecision,
    LoopObservation,
    SchedulerContext,
    reason_code,
    reason_name,
)
from cognexis.looping.schedulers.fixed import FixedScheduler
from cognexis.looping.schedulers.hybrid import HybridScheduler
from cognexis.looping.schedulers.rule_based import RuleBasedScheduler
from tests.batteries.observations import context, observation


def test_reason_codes_and_names_are_inverse():
    assert [reason_name(reason_code(name)) for name in HALT_REASONS] == list(HALT_REASONS)
    assert [reason_code(name) for name in HALT_REASONS] == list(range(1, 11))
    assert reason_name(NO_REASON) is None
    with pytest.raises(InvalidConfigError, match="halt_reason='saftey'.*did you mean 'safety'"):
        reason_code("saftey")
    with pytest.raises(InvalidConfigError, match="halt_reason=11: must be a code between 0 and 10"):
        reason_name(11)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_loops": 3, "max_loops": 2}, "max_loops=2: must be at least min_loops=3"),
        ({"min_loops": 0}, "min_loops=0: must be an integer of at least 1"),
        ({"min_loops": True}, "min_loops=True: must be an integer"),
        ({"max_loops": 2.0}, "max_loops=2.0: must be an integer"),
        ({"request_id": " "}, "request_id=' ': must be a text that is not empty"),
        ({"request_id": 7}, "request_id=7"),
        ({"loop_budget": -1}, "loop_budget=-1: must be an integer of at least 0"),
        ({"quality_tier": "balance"}, "quality_tier='balance'.*did you mean 'balanced'"),
    ],
)
def test_context_refuses_what_makes_no_sense(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        context(**fields)


def test_context_accepts_its_corners():
    assert SchedulerContext("r", 1, 1, loop_budget=0, quality_tier="fast").is_analysis is False


def test_observation_has_the_fields_of_the_contract_and_no_label():
    names = {field.name for field in dataclasses.fields(LoopObservation)}
    assert names >= {"loops", "min_loops", "max_loops", "hidden_delta", "relative_delta", "confidence", "entropy"}
    assert names >= {"predicted_gain", "remaining_loops", "remaining_flops", "remaining_ms", "is_risky", "preference"}
    assert not [name for name in names if "label" in name or "loss" in name]
    with pytest.raises(TypeError, match="labels"):
        LoopObservation(loops=1, min_loops=1, max_loops=2, labels=torch.zeros(2))


@pytest.mark.parametrize(
    ("loops", "low", "high", "message"),
    [(-1, 1, 2, "loops=-1"), (1, 0, 2, "min_loops=0"), (1, 3, 2, "min_loops=3: .* at most max_loops=2")],
)
def test_observation_refuses_contradicting_bounds(loops, low, high, message):
    with pytest.raises(InvalidConfigError, match=message):
        LoopObservation(loops=loops, min_loops=low, max_loops=high)


def test_observation_knows_its_slots():
    assert observation(1).shape == ()
    assert observation(1).device is None
    seen = observation(1, confidence=torch.zeros(3, 1), entropy=torch.zeros(()), is_risky=torch.zeros(1, 5) > 0)
    assert seen.shape == (3, 5)
    assert seen.device == torch.device("cpu")


@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4), (3, 5, 1)])
def test_observation_refuses_tensors_of_other_slots(shape):
    with pytest.raises(ShapeMismatchError, match="must have the shape of the slots"):
        observation(1, confidence=torch.zeros(3, 5), entropy=torch.zeros(shape))


def test_decision_about_one_slot_is_read_as_words():
    code = reason_code("confidence")
    halt = LoopDecision(torch.tensor(True), torch.tensor(code, dtype=torch.int8))
    assert (halt.action, halt.halt_reason) == ("halt", "confidence")
    note = LoopDecision(torch.tensor([False]), torch.tensor([reason_code("min_loops_not_met")], dtype=torch.int8))
    assert (note.action, note.halt_reason) == ("continue", None)


def test_decision_about_more_slots_has_no_single_answer():
    decision = LoopDecision(torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int8))
    with pytest.raises(ShapeMismatchError, match=r"\(2,\) slots has no single answer"):
        _ = decision.action
    with pytest.raises(ValueError, match="no single answer"):
        _ = decision.halt_reason


def golden_trace(scheduler):
    scheduler.begin_request(context(loop_budget=8))
    scheduler.observe(observation(0, relative_delta=10.0, confidence=0.1, predicted_gain=1.0))
    scheduler.observe(observation(1, relative_delta=0.0, confidence=0.99, predicted_gain=0.0))


def test_record_of_two_observations():
    scheduler = HybridScheduler()
    golden_trace(scheduler)
    summary = scheduler.finish()
    assert (summary["loops"], summary["budget_used"], summary["reasons"]) == (1, 1, {"value_gain": 1})
    assert summary["means"]["relative_delta"] == [10.0, 0.0]
    assert summary["means"]["confidence"] == pytest.approx([0.1, 0.99])
    assert json.loads(json.dumps(summary)) == summary


EMPTY = {"loops": 0, "budget_used": 0, "reasons": {}, "means": {}}


def test_record_is_cleared_by_finish_and_by_a_new_request():
    scheduler = HybridScheduler()
    assert scheduler.finish() == EMPTY
    golden_trace(scheduler)
    scheduler.finish()
    assert scheduler.finish() == EMPTY
    golden_trace(scheduler)
    scheduler.begin_request(context())
    scheduler.begin_request(context())
    assert scheduler.finish() == EMPTY


def test_record_adds_up_the_passes_of_a_request():
    scheduler = RuleBasedScheduler()
    scheduler.begin_request(context())
    for delta in (1.0, 3.0):
        for loops in (1, 2, 3):
            scheduler.observe(observation(loops, relative_delta=[delta, 0.01 if loops > 1 else delta]))
    scheduler.observe(observation(1, relative_delta=[0.0, math.inf]))
    assert scheduler.finish() == {
        "loops": 1,
        "budget_used": 7,
        "reasons": {"min_delta": 3},
        "means": {"relative_delta": [None, pytest.approx(4.02 / 4), pytest.approx(4.02 / 4)]},
    }


def test_record_counts_the_first_reason_of_a_slot_and_only_active_ones():
    scheduler = RuleBasedScheduler(confidence_threshold=0.5)
    seen = {"is_active": [True, True, False], "confidence": [0.9, 0.0, 0.9]}
    scheduler.observe(observation(1, max_loops=2, relative_delta=[1.0, 1.0, 5.0], **seen))
    scheduler.observe(observation(2, max_loops=2, relative_delta=[0.0, 2.0, 5.0], **seen))
    summary = scheduler.finish()
    assert summary["reasons"] == {"confidence": 1, "max_loops": 1}
    assert summary["means"]["relative_delta"] == [1.0, 1.0]


def test_record_keeps_counting_rows_that_have_left_the_batch():
    scheduler = RuleBasedScheduler()
    scheduler.observe(observation(1, max_loops=2, relative_delta=[0.0, 0.0, 1.0]))
    scheduler.select(torch.tensor([1, 2]))
    scheduler.observe(observation(2, max_loops=2, relative_delta=[0.0, 1.0]))
    assert scheduler.finish()["reasons"] == {"min_delta": 2, "max_loops": 1}


def test_slots_cannot_change_within_a_pass_without_select():
    scheduler = FixedScheduler(4)
    scheduler.observe(observation(1, is_active=[True, True]))
    with pytest.raises(ShapeMismatchError, match=r"from \(2,\) to \(1,\) within a pass; call select"):
        scheduler.observe(observation(2, is_active=[True]))


def numbers_kept(scheduler) -> int:
    trace = vars(scheduler.trace)
    sums = sum(len(by_loop) for by_loop in trace["_sums"].values())
    return sums + sum(value.numel() for value in trace.values() if isinstance(value, torch.Tensor))


def test_state_does_not_grow_with_the_length_of_a_text():
    scheduler = RuleBasedScheduler(patience=2, delay=1, hysteresis=0.1)
    sizes = set()
    for _ in range(20):
        for loops in range(1, 9):
            scheduler.observe(observation(loops, relative_delta=torch.rand(3, 5)))
        sizes.add(numbers_kept(scheduler))
    assert max(sizes) <= 8 + 10 + 15  # one sum per loop, one count per reason, one reason per slot
