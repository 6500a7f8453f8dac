"""The hard rules: the whole truth table, and random answers of schedulers that ignore every bound."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.looping.schedulers.base import LoopDecision, reason_code, reason_name
from cognexis.looping.schedulers.guard import apply_bounds
from cognexis.looping.schedulers.hybrid import HybridScheduler
from tests.batteries.observations import answers, observation


def answer(halt, reason="confidence", shape=()):
    return LoopDecision(torch.full(shape, halt), torch.full(shape, reason_code(reason), dtype=torch.int8))


@pytest.mark.parametrize("is_risky", [False, True])
@pytest.mark.parametrize("loops_left", [None, 1, 0])
@pytest.mark.parametrize("flops_left", [None, 1.0, 0.0])
@pytest.mark.parametrize("ms_left", [None, 1.0, -1.0])
def test_precedence_is_safety_budget_maximum_minimum_scheduler(is_risky, loops_left, flops_left, ms_left):
    for loops, (low, high), wants_halt in itertools.product(range(4), [(1, 1), (1, 3), (2, 3)], [False, True]):
        if is_risky:
            expected = (True, "safety")
        elif loops_left == 0 or flops_left == 0.0 or ms_left == -1.0:
            expected = (True, "budget")
        elif loops >= high:
            expected = (True, "max_loops")
        elif loops < low:
            expected = (False, "min_loops_not_met")
        else:
            expected = (wants_halt, "confidence" if wants_halt else None)
        for as_tensor in (False, True):
            left = torch.tensor([loops_left]) if as_tensor and loops_left is not None else loops_left
            seen = observation(
                loops,
                min_loops=low,
                max_loops=high,
                is_risky=[is_risky],
                remaining_loops=left,
                remaining_flops=flops_left,
                remaining_ms=ms_left,
            )
            decision = apply_bounds(seen, answer(wants_halt, shape=(1,)))
            assert (decision.halt.item(), reason_name(decision.reasons.item())) == expected
            assert decision.halt.dtype == torch.bool and decision.reasons.dtype == torch.int8


def test_golden_cases_of_the_precedence():
    signals = {"relative_delta": 0.0, "confidence": 1.0, "predicted_gain": 0.0}
    risky = observation(0, min_loops=2, is_risky=True, **signals)
    early = observation(1, min_loops=2, **signals)
    assert answers(HybridScheduler(), risky) == [("halt", "safety")]
    assert answers(HybridScheduler(), early) == [("continue", None)]
    assert HybridScheduler().observe(early).reasons.item() == reason_code("min_loops_not_met")


def test_hard_rules_hold_for_each_slot_by_itself():
    left, risky = torch.tensor([[1, 0, 0], [5, 5, 5]]), torch.tensor([[False], [True]])
    decision = apply_bounds(observation(2, remaining_loops=left, is_risky=risky), answer(False))
    assert decision.halt.tolist() == [[False, True, True], [True, True, True]]
    names = [[reason_name(code) for code in row] for row in decision.reasons.tolist()]
    assert names == [[None, "budget", "budget"], ["safety"] * 3]


def test_a_budget_that_is_no_number_counts_as_used_up():
    for fields in ({"remaining_ms": float("nan")}, {"remaining_loops": torch.tensor(float("nan"))}):
        assert apply_bounds(observation(1, **fields), answer(False)).halt_reason == "budget"


def test_a_budget_needs_no_tensor_to_stop_everything():
    assert apply_bounds(observation(1, remaining_loops=0), answer(False, shape=(2,))).halt.tolist() == [True, True]


def run_all_loops(seed, low, high, budget_cap):
    """Run 1,000 slots under a scheduler that answers at random; returns budgets, risks, loops and reasons."""
    generator = torch.Generator().manual_seed(seed)
    slots = 1000
    budget = torch.randint(1, budget_cap + 1, (slots,), generator=generator)
    risky_from = torch.randint(1, 40, (slots,), generator=generator)
    loops_run = torch.zeros(slots, dtype=torch.long)
    reasons = torch.zeros(slots, dtype=torch.int8)
    for loops in range(1, high + 5):  # a driver that would run too long, too
        loops_run += reasons == 0
        rogue = LoopDecision(
            torch.rand(slots, generator=generator) < 0.3,
            torch.randint(-128, 128, (slots,), generator=generator, dtype=torch.int8),
        )
        seen = observation(
            loops, min_loops=low, max_loops=high, remaining_loops=budget - loops, is_risky=risky_from <= loops
        )
        decision = apply_bounds(seen, rogue)
        again = apply_bounds(seen, decision)
        assert torch.equal(decision.halt, again.halt) and torch.equal(decision.reasons, again.reasons)
        reasons = torch.where((reasons == 0) & decision.halt, decision.reasons, reasons)
    return budget, risky_from, loops_run, reasons


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 8), st.integers(1, 20))
def test_no_scheduler_breaks_a_bound(seed, low, extra, budget_cap):
    high = low + extra
    budget, risky_from, loops_run, reasons = run_all_loops(seed, low, high, budget_cap)
    by_safety, by_budget = reasons == reason_code("safety"), reasons == reason_code("budget")
    assert (loops_run <= high).all()
    assert (loops_run <= budget).all()
    assert (loops_run <= risky_from).all()
    assert ((loops_run >= low) | by_safety | by_budget).all()
    assert torch.equal(by_safety, loops_run == risky_from)
    assert torch.equal(by_budget, (loops_run == budget) & ~by_safety)
    soft = ("min_delta", "confidence", "value_gain", "max_loops", "forced")
    assert set(reasons.tolist()) <= {reason_code(name) for name in (*soft, "safety", "budget")}


@pytest.mark.parametrize("name", ["safety", "budget", "error", "min_loops_not_met", "all_tokens_halted"])
def test_a_scheduler_cannot_claim_a_hard_reason(name):
    assert apply_bounds(observation(2), answer(True, name)).halt_reason == "forced"


@pytest.mark.parametrize("code", [0, -1, 11, 127])
def test_a_halt_without_a_known_reason_becomes_forced(code):
    decision = LoopDecision(torch.tensor(True), torch.tensor(code))
    assert apply_bounds(observation(2), decision).halt_reason == "forced"


@pytest.mark.parametrize("name", ["min_delta", "confidence", "value_gain", "max_loops", "forced"])
def test_a_soft_reason_stays(name):
    assert apply_bounds(observation(2), answer(True, name)).halt_reason == name


def test_a_continuing_slot_has_no_reason():
    assert apply_bounds(observation(2), answer(False)).reasons.item() == 0


def test_one_answer_for_all_slots_is_enough():
    decision = apply_bounds(observation(2, confidence=torch.zeros(2, 3)), answer(True))
    assert decision.halt.shape == decision.reasons.shape == (2, 3)
    assert decision.halt.all()


def test_diagnostics_pass_through():
    decision = answer(True)
    decision.diagnostics["why"] = 1
    assert apply_bounds(observation(2), decision).diagnostics == {"why": 1}


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (True, "returned bool; observe\\(\\) must return a LoopDecision"),
        (None, "returned NoneType"),
        (LoopDecision(True, torch.zeros(3)), "returned halt as bool; must be a tensor"),
        (LoopDecision(torch.zeros(3), torch.zeros(3, dtype=torch.int8)), "halt of torch.float32"),
        (LoopDecision(torch.zeros(3, dtype=torch.bool), torch.zeros(3)), "reasons of torch.float32"),
    ],
)
def test_what_is_no_decision_is_refused(decision, message):
    with pytest.raises(InvalidConfigError, match=message):
        apply_bounds(observation(2, confidence=torch.zeros(3)), decision)


def test_a_decision_about_other_slots_is_refused():
    with pytest.raises(ShapeMismatchError, match=r"halt of shape \(2,\); the slots have \(3,\)"):
        apply_bounds(observation(2, confidence=torch.zeros(3)), answer(True, shape=(2,)))
