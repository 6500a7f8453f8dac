"""Schedulers by name, tiers, and what all schedulers must do alike."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers import registry
from cognexis.looping.schedulers.base import QUALITY_TIERS, LoopDecision, LoopScheduler, reason_code
from cognexis.looping.schedulers.guard import apply_bounds
from cognexis.looping.schedulers.hybrid import HybridScheduler
from cognexis.looping.schedulers.registry import (
    build_scheduler,
    register_scheduler,
    scheduler_names,
    tier_settings,
)
from tests.batteries.observations import context, observation, random_observation

SLOTS = (4, 3)
STEADY = {"patience": 2, "delay": 1, "hysteresis": 0.2}
SPECS = [
    {"type": "fixed", "num_loops": 3},
    {"type": "rule_based", "confidence_threshold": 0.8, "entropy_threshold": 0.1, "kl_threshold": 0.1},
    {"type": "rule_based", "min_delta": 0.05, **STEADY},
    {"type": "value_head"},
    {"type": "value_head", "output_kind": "risk_adjusted_gain", "risk_weight": 1e-4, **STEADY},
    {"type": "value_head", "output_kind": "continue_logit"},
    {"type": "value_head", "loop_thresholds": [0.2, 0.1]},
    {"type": "value_head", "output_kind": "uncertainty", "gain_threshold": 0.5},
    {"type": "hybrid", "large_delta": 0.09, "gain_fallthrough": True},
    {"type": "hybrid", "confidence_threshold": 0.5, **STEADY},
    {"type": "act", "ponder_cost": 1e-5},
    {"type": "oracle", "losses": torch.rand(8, *SLOTS, generator=torch.Generator().manual_seed(3))},
]
every_scheduler = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["type"])


def build(spec):
    return build_scheduler(spec, allow_analysis=True)


def one_slot_of(spec, index):
    return spec if "losses" not in spec else spec | {"losses": spec["losses"][:, index[0], index[1]]}


@every_scheduler
def test_dictionary_builds_an_equal_scheduler(spec):
    scheduler = build(spec)
    text = json.dumps(scheduler.to_dict(), allow_nan=False)
    again = build(json.loads(text))
    assert type(again) is type(scheduler)
    assert again.to_dict() == scheduler.to_dict()
    assert json.dumps(again.to_dict()) == text
    assert set(spec) <= set(scheduler.to_dict())


@pytest.mark.parametrize("name", ["fixed", "rule_based", "value_head", "hybrid", "act"])
def test_a_name_means_the_defaults(name):
    assert build_scheduler(name).to_dict() == build_scheduler({"type": name}).to_dict()
    assert build_scheduler(name).name == name


@every_scheduler
def test_answer_of_all_slots_is_that_of_each(spec):
    seen = [random_observation(loops, SLOTS, seed=loops) for loops in range(1, 8)]
    together = build(spec)
    together.begin_request(context(is_analysis=True))
    decisions = [together.observe(each) for each in seen]
    assert all(decision.halt.shape == SLOTS for decision in decisions)
    for index in torch.cartesian_prod(torch.arange(SLOTS[0]), torch.arange(SLOTS[1])).tolist():
        alone = build(one_slot_of(spec, index))
        alone.begin_request(context(is_analysis=True))
        for each, decision in zip(seen, decisions, strict=True):
            tensors = {name: v[tuple(index)] for name, v in vars(each).items() if isinstance(v, torch.Tensor)}
            single = alone.observe(observation(each.loops, **tensors))
            assert single.halt.shape == ()
            assert single.halt == decision.halt[tuple(index)]
            assert single.reasons == decision.reasons[tuple(index)]


@every_scheduler
def test_deciding_never_waits_for_the_device(spec):
    if "losses" in spec:
        spec = spec | {"losses": spec["losses"].to("meta")}
    scheduler = build(spec)
    scheduler.begin_request(context(is_analysis=True))
    for loops in (1, 2, 3, 1, 8):
        each = random_observation(loops, SLOTS, seed=1)
        tensors = {name: v.to("meta") for name, v in vars(each).items() if isinstance(v, torch.Tensor)}
        flags = torch.ones(SLOTS, dtype=torch.bool, device="meta")
        budget = torch.ones(SLOTS, dtype=torch.long, device="meta")
        seen = observation(loops, **tensors, is_risky=flags, is_active=flags, remaining_loops=budget)
        assert scheduler.observe(seen).halt.is_meta
        scheduler.select(torch.arange(SLOTS[0], device="meta"))
    with pytest.raises(RuntimeError, match="meta"):  # reading does wait, so the test above could fail
        scheduler.finish()


@every_scheduler
@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 4))
def test_answers_stay_inside_the_bounds(spec, seed, low, extra):
    high = low + extra
    scheduler = build(spec)
    scheduler.begin_request(context(min_loops=low, max_loops=high, is_analysis=True))
    left = torch.randint(1, 9, SLOTS, generator=torch.Generator().manual_seed(seed))
    active = torch.ones(SLOTS, dtype=torch.bool)
    loops_run = torch.zeros(SLOTS, dtype=torch.long)
    ended = torch.zeros(SLOTS, dtype=torch.bool)
    for loops in range(1, high + 1):
        loops_run += active
        limits = {"min_loops": low, "max_loops": high, "remaining_loops": left - loops}
        decision = scheduler.observe(random_observation(loops, SLOTS, seed + loops, **limits))
        ended |= active & (decision.reasons == reason_code("budget"))
        active = active & ~decision.halt
        assert torch.equal(decision.reasons > reason_code("min_loops_not_met"), decision.halt)
    assert not active.any()
    assert (loops_run <= left.clamp(max=high)).all() and ((loops_run >= low) | ended).all()


@every_scheduler
def test_record_is_small_json_and_ends_with_the_request(spec):
    scheduler = build(spec)
    for _ in range(2):
        scheduler.begin_request(context(is_analysis=True))
        for loops in (1, 2):
            scheduler.observe(random_observation(loops, SLOTS, seed=loops))
        summary = scheduler.finish()
        assert summary["loops"] == summary["budget_used"] == 2
        assert set(summary["means"]) == scheduler.signals
        assert len(json.dumps(summary, allow_nan=False)) < 1000
        assert scheduler.finish()["loops"] == 0


# ---- registry ----


@pytest.fixture(autouse=True)
def _no_registrations(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})


class EveryOther(LoopScheduler):
    """A user's scheduler: halts at loops of one parity, and claims that it was for safety."""

    def __init__(self, parity: int = 0) -> None:
        self.parity = parity

    def observe(self, observation):
        halt = torch.full(observation.shape, observation.loops % 2 == self.parity)
        return LoopDecision(halt, torch.full(observation.shape, reason_code("safety"), dtype=torch.int8))


def test_a_users_scheduler_is_chosen_by_name_or_dictionary():
    register_scheduler("every_other", EveryOther)
    assert scheduler_names() == ("fixed", "rule_based", "value_head", "hybrid", "act", "oracle", "every_other")
    assert build_scheduler("every_other").parity == 0
    scheduler = build_scheduler({"type": "every_other", "parity": 1})
    assert scheduler.to_dict() == {"type": "every_other", "parity": 1}
    assert build_scheduler(scheduler.to_dict()).parity == 1
    assert scheduler.signals == frozenset()
    scheduler.begin_request(context())
    seen = observation(1, confidence=torch.zeros(2))
    decision = apply_bounds(seen, scheduler.observe(seen))
    scheduler.record(seen, decision)
    scheduler.select(torch.tensor([0]))
    assert scheduler.finish()["reasons"] == {"forced": 2}


def test_a_users_scheduler_is_held_to_its_fields():
    register_scheduler("every_other", EveryOther)
    with pytest.raises(InvalidConfigError, match="scheduler.pairity: every_other has no such field.*'parity'"):
        build_scheduler({"type": "every_other", "pairity": 1})


def test_the_same_class_may_be_registered_again():
    register_scheduler("every_other", EveryOther)
    register_scheduler("every_other", EveryOther)
    other = type("Other", (EveryOther,), {})
    with pytest.raises(InvalidConfigError, match="is registered for EveryOther already"):
        register_scheduler("every_other", other)


@pytest.mark.parametrize("name", ["fixed", "hybrid", "oracle", "act"])
def test_built_in_names_are_taken(name):
    with pytest.raises(InvalidConfigError, match=f"scheduler='{name}': is the name of a built-in scheduler"):
        register_scheduler(name, EveryOther)


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("", EveryOther, "must be a name of letters"),
        ("a b", EveryOther, "must be a name of letters"),
        (None, EveryOther, "must be a name of letters"),
        ("mine", LoopScheduler, "that implements observe"),
        ("mine", dict, "must be a subclass of LoopScheduler"),
        ("mine", EveryOther(), "must be a subclass of LoopScheduler"),
        ("mine", HybridScheduler, "must equal HybridScheduler.name, 'hybrid'"),
    ],
)
def test_what_cannot_be_registered_is_refused(name, cls, message):
    with pytest.raises(InvalidConfigError, match=message):
        register_scheduler(name, cls)


def test_a_scheduler_is_returned_as_it_is():
    scheduler = HybridScheduler()
    assert build_scheduler(scheduler) is scheduler


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rulebased", "scheduler.type='rulebased': must be one of fixed.*did you mean 'rule_based'"),
        ({"type": "hybird"}, "did you mean 'hybrid'"),
        ({"type": None}, "scheduler.type=None"),
        ({"min_delta": 0.1}, 'needs a "type", one of fixed, rule_based'),
        ({"type": "rule_based", "min_dleta": 0.1}, "scheduler.min_dleta: .*did you mean 'min_delta'"),
        ({"type": "fixed", "patience": 2}, "scheduler.patience: fixed has no such field; known: num_loops"),
        ({"type": "rule_based", "min_delta": -1}, "min_delta=-1"),
        (3, "scheduler=3: must be a name, a dictionary or a LoopScheduler"),
        (None, "scheduler=None"),
        (HybridScheduler, "must be a name, a dictionary or a LoopScheduler"),
    ],
)
def test_wrong_descriptions_are_refused(spec, message):
    with pytest.raises(InvalidConfigError, match=message):
        build_scheduler(spec)


def test_the_oracle_needs_permission_and_losses():
    spec = {"type": "oracle", "losses": [[1.0], [0.5]]}
    for refused in ("oracle", spec, build(spec)):
        with pytest.raises(InvalidConfigError, match="scheduler='oracle': sees true losses and is for analysis only"):
            build_scheduler(refused)
    assert build_scheduler(spec, allow_analysis=True).losses.tolist() == [[1.0], [0.5]]
    with pytest.raises(InvalidConfigError, match="scheduler.losses: oracle needs this field"):
        build_scheduler("oracle", allow_analysis=True)


def test_a_description_is_not_changed():
    spec = {"type": "rule_based", "min_delta": 1}
    build_scheduler(spec)
    assert spec == {"type": "rule_based", "min_delta": 1}


# ---- documentation ----

PAGE = Path(__file__).parents[3] / "docs" / "adaptive_depth.md"


def cells(first):
    """The further cells of the table row that begins with ``first`` in code font."""
    row = next(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(f"| `{first}` |"))
    return [cell.strip() for cell in row.strip("|").split("|")[1:]]


@pytest.mark.parametrize("name", ["fixed", "rule_based", "value_head", "hybrid", "act", "oracle"])
def test_page_lists_every_field_with_its_default(name):
    parameters = inspect.signature(registry._BUILT_IN[name]).parameters.values()
    common = {"patience": 1, "delay": 0, "hysteresis": 0.0}
    own = [each for each in parameters if each.name not in common]
    expected = [each.name if each.default is each.empty else f"{each.name}={each.default!r}" for each in own]
    assert re.findall(r"`([^`]+)`", cells(name)[0]) == expected
    assert {each.name: each.default for each in parameters if each not in own} in ({}, common)
    assert all(cells(field)[0] == f"`{default}`" for field, default in common.items())


@pytest.mark.parametrize("tier", QUALITY_TIERS)
def test_page_lists_the_thresholds_of_the_tiers(tier):
    thresholds = tier_settings(tier, 1, 8)[2]
    assert [float(cell) for cell in cells(tier)[1:]] == list(thresholds.values())


# ---- tiers ----


def test_tiers_map_to_bounds_and_thresholds():
    assert tier_settings("fast", 1, 8)[:2] == (1, 5)
    assert tier_settings("balanced", 1, 8)[:2] == (1, 8)
    assert tier_settings("thorough", 1, 8)[:2] == (5, 8)
    balanced = tier_settings("balanced", 1, 8)[2]
    assert {name: getattr(HybridScheduler(), name) for name in balanced} == balanced


def test_faster_tiers_halt_more_easily():
    fast, balanced, thorough = (tier_settings(tier, 1, 8)[2] for tier in QUALITY_TIERS)
    for name in ("min_delta", "gain_threshold"):
        assert fast[name] > balanced[name] > thorough[name] > 0
    assert fast["confidence_threshold"] < balanced["confidence_threshold"] < thorough["confidence_threshold"] < 1


@pytest.mark.parametrize("tier", QUALITY_TIERS)
def test_tiers_stay_inside_the_bounds_of_the_policy(tier):
    for low in range(1, 7):
        for high in range(low, 9):
            bounds = tier_settings(tier, low, high)
            assert low <= bounds[0] <= bounds[1] <= high
    HybridScheduler(**tier_settings(tier, 1, 8)[2])


def test_thresholds_of_a_tier_are_a_copy():
    tier_settings("fast", 1, 2)[2]["min_delta"] = 9.0
    assert tier_settings("fast", 1, 2)[2]["min_delta"] == 0.1


def test_unknown_tiers_and_contradicting_bounds_are_refused():
    with pytest.raises(InvalidConfigError, match="quality_tier='through'.*did you mean 'thorough'"):
        tier_settings("through", 1, 2)
    with pytest.raises(InvalidConfigError, match="max_loops=2: must be an integer of at least 3"):
        tier_settings("fast", 3, 2)


@pytest.mark.parametrize("name", ["value_head", "hybrid", "act"])
def test_gain_threshold_has_its_name_in_run_configurations_too(name):
    scheduler = build_scheduler({"type": name, "predicted_gain_threshold": 0.25})
    assert scheduler.to_dict()["gain_threshold"] == 0.25
    with pytest.raises(InvalidConfigError, match="predicted_gain_threshold=0.25: is gain_threshold, which is given"):
        build_scheduler({"type": name, "predicted_gain_threshold": 0.25, "gain_threshold": 0.25})


def test_alias_belongs_to_schedulers_with_the_field():
    with pytest.raises(InvalidConfigError, match="rule_based has no such field"):
        build_scheduler({"type": "rule_based", "predicted_gain_threshold": 0.25})
