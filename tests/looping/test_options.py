"""How many loops a call may run: bounds, modes, schedulers and where each setting comes from."""

from typing import Any

import pytest
import torch

from cognexis.errors import CognexisError, InvalidConfigError
from cognexis.looping.options import (
    CACHE_POLICIES,
    LOOP_KEYWORDS,
    LOOP_MODES,
    REQUEST_KEYWORDS,
    LoopOptions,
    budget_limits,
    calibrated_dependency,
    loop_bound,
    loop_count,
    refuse_misspelt,
    resolve_loop_options,
)
from cognexis.looping.schedulers.fixed import FixedScheduler
from cognexis.looping.schedulers.oracle import OracleScheduler
from cognexis.looping.schedulers.registry import build_scheduler
from cognexis.looping.schedulers.rule_based import RuleBasedScheduler
from tests.batteries.tiny import tiny_config

CONFIG = tiny_config(trained_max_loops=8, max_loops=8, min_loops=2, default_loops=4)
TOKENS = "adaptive_token"


def resolve(**given: Any) -> LoopOptions:
    return resolve_loop_options(given.pop("config", CONFIG), **given)


@pytest.mark.parametrize("value", [1, 64, torch.tensor(3), torch.tensor(3, dtype=torch.int8)], ids=str)
def test_a_loop_count_is_an_integer_or_a_tensor_without_axes(value: Any) -> None:
    assert loop_count("num_loops", value) == int(value)


@pytest.mark.parametrize(
    "value",
    [0, -1, True, 1.0, "2", None, 10**9, [2], torch.tensor([2]), torch.tensor(2.0), torch.tensor(True)],
    ids=str,
)
def test_other_loop_counts_are_refused(value: Any) -> None:
    with pytest.raises(InvalidConfigError, match="min_loops") as caught:
        loop_count("min_loops", value)
    assert caught.value.path == "min_loops"


@pytest.mark.parametrize(
    "given, bounds",
    [
        ({}, (2, 4, 8)),
        ({"num_loops": 3}, (2, 3, 8)),
        ({"num_loops": torch.tensor(5)}, (2, 5, 8)),
        ({"min_loops": 1, "num_loops": 1}, (1, 1, 8)),
        ({"max_loops": 3}, (2, 3, 3)),  # the default moves inside narrowed bounds
        ({"min_loops": 6}, (6, 6, 8)),
        ({"num_loops": 12, "allow_extrapolation": True}, (2, 12, 12)),
        ({"num_loops": 10, "max_loops": 11, "allow_extrapolation": True}, (2, 10, 11)),
    ],
    ids=str,
)
def test_fixed_runs_stay_within_their_bounds(given: dict[str, Any], bounds: tuple[int, int, int]) -> None:
    options = resolve(**given)
    assert (options.min_loops, options.num_loops, options.max_loops) == bounds
    assert options.loop_mode == "fixed" and options.requested_loops == options.num_loops
    assert options.extrapolated is (options.num_loops > 8)
    assert not options.is_adaptive and not options.mixes_depths


@pytest.mark.parametrize(
    "given, path",
    [
        ({"num_loops": 1}, "num_loops"),
        ({"num_loops": 9}, "num_loops"),
        ({"num_loops": torch.tensor([2, 9])}, "num_loops"),
        ({"num_loops": torch.tensor([1, 2])}, "num_loops"),
        ({"num_loops": torch.tensor([2.0, 3.0])}, "num_loops"),
        ({"num_loops": torch.tensor([], dtype=torch.long)}, "num_loops"),
        ({"num_loops": torch.tensor([[2]])}, "num_loops"),
        ({"num_loops": 5, "max_loops": 4}, "num_loops"),
        ({"num_loops": 5, "max_loops": 4, "allow_extrapolation": True}, "num_loops"),
        ({"max_loops": 9}, "max_loops"),
        ({"max_loops": 1}, "min_loops"),
        ({"min_loops": 5, "max_loops": 4}, "min_loops"),
        ({"min_loops": 9}, "min_loops"),
        ({"allow_extrapolation": "yes"}, "allow_extrapolation"),
        ({"loop_mode": "sometimes"}, "loop_mode"),
        ({"loop_mode": 3}, "loop_mode"),
        ({"cache_policy": "all"}, "cache_policy"),
        ({"halt_dependency": "word", "loop_mode": TOKENS}, "halt_dependency"),
        ({"scheduler": "rule_based"}, "scheduler"),
        ({"scheduler": {"type": "hybrid"}}, "scheduler"),
        ({"scheduler": RuleBasedScheduler()}, "scheduler"),
        ({"halt_dependency": "prefix"}, "halt_dependency"),
        ({"quality_tier": "fast"}, "quality_tier"),
        ({"loop_mode": TOKENS, "num_loops": 3}, "num_loops"),
        ({"loop_mode": TOKENS, "num_loops": torch.tensor([3, 3])}, "num_loops"),
        ({"loop_mode": TOKENS, "scheduler": "rules"}, "scheduler.type"),
        ({"loop_mode": TOKENS, "scheduler": {"type": "rule_based", "min_dleta": 1}}, "scheduler.min_dleta"),
        ({"loop_mode": TOKENS, "scheduler": "oracle"}, "scheduler"),
        ({"loop_mode": TOKENS, "scheduler": OracleScheduler(torch.zeros(2, 1))}, "scheduler"),
        ({"loop_mode": TOKENS, "scheduler": 3}, "scheduler"),
        ({"loop_mode": TOKENS, "quality_tier": "slow"}, "quality_tier"),
        ({"loop_mode": "adaptive_sequence", "halt_dependency": "token"}, "halt_dependency"),
        ({"loop_mode": "adaptive", "halt_dependency": "prefix"}, "halt_dependency"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(given: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        resolve(**given)
    assert caught.value.path == path


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    for name, known in (("loop_mode", LOOP_MODES), ("cache_policy", CACHE_POLICIES)):
        with pytest.raises(InvalidConfigError, match=", ".join(known)):
            resolve(**{name: "xyz"})
    with pytest.raises(InvalidConfigError, match="did you mean 'rule_based'"):
        resolve(loop_mode=TOKENS, scheduler="rule_base")


@pytest.mark.parametrize(
    "alias, mode",
    [("adaptive", "adaptive_sequence"), ("token_adaptive", TOKENS), ("tokenwise", TOKENS), ("token_wise", TOKENS)],
)
def test_modes_have_aliases(alias: str, mode: str) -> None:
    assert resolve(loop_mode=alias).loop_mode == mode


def test_loops_by_row_mix_depths() -> None:
    rows = torch.tensor([3, 2, 7])
    options = resolve(num_loops=rows)
    assert options.row_loops is rows and options.mixes_depths and not options.is_adaptive
    assert (options.num_loops, options.requested_loops) == (7, 7)
    assert resolve(num_loops=torch.tensor([3, 12]), allow_extrapolation=True).extrapolated


@pytest.mark.parametrize("policy", CACHE_POLICIES)
def test_only_the_exact_policy_leaves_a_fixed_run_as_it_is(policy: str) -> None:
    options = resolve(cache_policy=policy)
    assert options.cache_policy == policy
    assert options.mixes_depths is (policy != "depth_indexed")


def test_adaptive_runs_are_bounded_and_rule_based_by_default() -> None:
    options = resolve(loop_mode=TOKENS)
    assert (options.min_loops, options.num_loops, options.max_loops) == (2, 8, 8)
    assert isinstance(options.scheduler, RuleBasedScheduler) and options.mixes_depths
    assert options.cache_policy == "depth_indexed"
    options = resolve(loop_mode=TOKENS, min_loops=3, max_loops=12, allow_extrapolation=True)
    assert (options.min_loops, options.num_loops, options.extrapolated) == (3, 12, True)


def test_the_dependency_is_that_of_the_call_or_follows_from_its_length() -> None:
    options = resolve(loop_mode=TOKENS)
    assert (options.dependency(5), options.dependency(1)) == ("prefix", "token")
    assert resolve(loop_mode=TOKENS, halt_dependency="row").dependency(1) == "row"
    for given in (None, "row"):
        assert resolve(loop_mode="adaptive_sequence", halt_dependency=given).dependency(1) == "row"


def same(options: LoopOptions, kind: str = "rule_based", **fields: Any) -> bool:
    """Whether the scheduler of this kind with these fields decides."""
    expected = build_scheduler({"type": kind, **fields}).to_dict()
    return options.scheduler is not None and options.scheduler.to_dict() == expected


def test_the_scheduler_comes_from_the_call_then_from_the_checkpoint() -> None:
    stored = {"type": "rule_based", "min_delta": 0.2}
    assert same(resolve(loop_mode=TOKENS, default_scheduler=stored), min_delta=0.2)
    mine = RuleBasedScheduler(min_delta=0.5)
    assert resolve(loop_mode=TOKENS, default_scheduler=stored, scheduler=mine).scheduler is mine
    assert same(resolve(loop_mode=TOKENS, default_scheduler=stored, scheduler="rule_based"), min_delta=0.2)
    assert same(resolve(loop_mode=TOKENS, default_scheduler=stored, scheduler={"type": "rule_based"}))
    assert same(resolve(loop_mode=TOKENS, default_scheduler={"type": "fixed", "num_loops": 3}))


@pytest.mark.parametrize("scheduler", [{"type": "fixed", "num_loops": 6}, FixedScheduler(6)], ids=type)
def test_a_fixed_scheduler_gives_the_loops_of_a_fixed_run(scheduler: Any) -> None:
    assert resolve(scheduler=scheduler).num_loops == 6
    assert resolve(scheduler=scheduler, num_loops=3).num_loops == 3
    assert resolve(scheduler="fixed").num_loops == 4
    with pytest.raises(InvalidConfigError, match="num_loops=6"):
        resolve(scheduler=scheduler, max_loops=5)


def test_a_measured_overthinking_depth_bounds_adaptive_runs_only() -> None:
    options = resolve(loop_mode=TOKENS, overthinking_threshold=5)
    assert (options.num_loops, options.max_loops, options.requested_loops) == (5, 5, 8)
    assert resolve(loop_mode=TOKENS, overthinking_threshold=5, max_loops=4).num_loops == 4
    assert resolve(loop_mode=TOKENS, overthinking_threshold=1).num_loops == 2  # never below the minimum
    assert resolve(num_loops=8, overthinking_threshold=5).num_loops == 8


TIERS = [("fast", (2, 5)), ("balanced", (2, 8)), ("thorough", (5, 8))]


@pytest.mark.parametrize("tier, bounds", TIERS)
def test_a_tier_stays_within_the_bounds_and_sets_open_thresholds(tier: str, bounds: tuple[int, int]) -> None:
    options = resolve(loop_mode=TOKENS, quality_tier=tier)
    assert (options.min_loops, options.max_loops) == bounds and options.quality_tier == tier
    assert isinstance(options.scheduler, RuleBasedScheduler)
    assert (options.scheduler.min_delta != 0.03) is (tier != "balanced")
    assert options.scheduler.confidence_threshold is None  # a rule that is off stays off
    given = resolve(loop_mode=TOKENS, quality_tier=tier, scheduler={"type": "rule_based", "min_delta": 0.07})
    assert same(given, min_delta=0.07)
    mine = RuleBasedScheduler()
    assert resolve(loop_mode=TOKENS, quality_tier=tier, scheduler=mine).scheduler is mine and mine.min_delta == 0.03


STORED = {"type": "value_head", "gain_threshold": 0.3, "loop_thresholds": [0.4, 0.2], "patience": 2}


@pytest.mark.parametrize("named", [None, "value_head"])
def test_a_scheduler_that_is_only_named_has_the_thresholds_of_the_checkpoint(named: str | None) -> None:
    options = resolve(loop_mode=TOKENS, scheduler=named, default_scheduler=STORED, default_dependency="row")
    assert same(options, "value_head", gain_threshold=0.3, loop_thresholds=[0.4, 0.2], patience=2)
    assert options.halt_dependency == "row", "for which they were chosen"
    asked = resolve(loop_mode=TOKENS, default_scheduler=STORED, default_dependency="row", halt_dependency="prefix")
    assert asked.halt_dependency == "prefix"


@pytest.mark.parametrize("given", [{"type": "value_head"}, "hybrid", {"type": "rule_based"}])
def test_a_scheduler_that_is_described_or_another_owes_the_checkpoint_nothing(given: Any) -> None:
    options = resolve(loop_mode=TOKENS, scheduler=given, default_scheduler=STORED, default_dependency="row")
    assert options.scheduler is not None and options.scheduler.to_dict() == build_scheduler(given).to_dict()
    assert options.halt_dependency is None


def test_a_tier_overrides_the_thresholds_of_the_checkpoint() -> None:
    options = resolve(loop_mode=TOKENS, quality_tier="fast", default_scheduler=STORED)
    assert same(options, "value_head", gain_threshold=2e-3, loop_thresholds=None, patience=2)
    given = {"type": "value_head", "predicted_gain_threshold": 0.3}
    options = resolve(loop_mode=TOKENS, quality_tier="fast", scheduler=given)
    assert same(options, "value_head", gain_threshold=0.3)


def test_a_tier_leaves_the_threshold_of_a_probability_alone() -> None:
    given = {"type": "value_head", "output_kind": "continue_logit"}
    assert resolve(loop_mode=TOKENS, quality_tier="fast", scheduler=given).scheduler.gain_threshold == 0.5


def test_dependency_of_the_thresholds_is_read_from_the_record() -> None:
    assert calibrated_dependency({"value_head": {"calibrated": {"halt_dependency": "row"}}}) == "row"
    for record in ({}, {"value_head": None}, {"value_head": {"calibrated": {"halt_dependency": "all"}}}):
        assert calibrated_dependency(record) is None


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, 6),
        ({"max_loops": 5}, 5),
        ({"max_loops": 7}, 6),
        ({"loop_mode": TOKENS, "allow_extrapolation": True}, 6),
        ({"num_loops": 12, "allow_extrapolation": True}, 6),
    ],
)
def test_a_budget_of_loops_lowers_the_bound(settings: dict[str, Any], bound: int) -> None:
    assert loop_bound(CONFIG, settings, 6) == bound


def test_a_budget_of_loops_above_the_maximum_admits_permitted_loops_and_no_others() -> None:
    beyond = {"num_loops": 12, "allow_extrapolation": True}
    assert resolve(**beyond, max_loops=loop_bound(CONFIG, beyond, 14)).num_loops == 12
    with pytest.raises(InvalidConfigError, match="num_loops=12"):
        resolve(**beyond, max_loops=loop_bound(CONFIG, beyond, 11))
    assert loop_bound(CONFIG, {"num_loops": 12}, 14) == loop_bound(CONFIG, {"loop_mode": TOKENS}, 14) == 8


def test_overthinking_bounds_a_tier() -> None:
    options = resolve(loop_mode=TOKENS, quality_tier="thorough", overthinking_threshold=6)
    assert (options.min_loops, options.max_loops) == (4, 6)


def test_a_capped_draft_keeps_the_number_that_was_asked_for() -> None:
    config = tiny_config(trained_max_loops=8, max_loops=8)
    config.__dict__["_loop_cap"] = 2
    options = resolve(config=config, num_loops=5)
    assert (options.num_loops, options.requested_loops) == (2, 5)


def test_limits_are_read_from_the_keywords_of_a_request() -> None:
    limits = budget_limits({"max_total_loops": 5, "max_wall_time_ms": 2.5, "num_loops": 3})
    assert (limits.max_total_loops, limits.max_wall_time_ms, limits.max_recurrent_flops) == (5, 2.5, None)
    with pytest.raises(CognexisError, match="max_total_loops=0"):
        budget_limits({"max_total_loops": 0})


@pytest.mark.parametrize("name", ["num_loop", "loops", "lop_mode", "schedular", "min_lops", "halt_dependancy"])
def test_a_misspelt_keyword_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"unknown argument '{name}'.*did you mean"):
        refuse_misspelt([name])


def test_other_keywords_pass() -> None:
    refuse_misspelt([*LOOP_KEYWORDS, "output_attentions", "max_new_tokens", "labels", "cache_position"])
    assert set(REQUEST_KEYWORDS) < set(LOOP_KEYWORDS)
