"""generate() with adaptive depth and budgets: hard limits, one result by every way, and statistics that tell it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

from cognexis import CognexisCache, CognexisGenerateBeamOutput, CognexisGenerateOutput
from cognexis.decoder.adaptive_run import AdaptiveRun
from cognexis.decoder.streaming import StepEventStreamer
from cognexis.errors import BudgetExceededError, InvalidConfigError, NonFiniteError, ShapeMismatchError
from cognexis.looping.budget import RequestBudget
from cognexis.looping.cost import core_flops_per_token, token_bytes
from cognexis.looping.options import CACHE_POLICIES
from cognexis.looping.schedulers.rule_based import RuleBasedScheduler
from tests.batteries.invariance import assert_same, left_padding, token_ids
from tests.batteries.scripted_schedulers import Rogue
from tests.batteries.tiny import tiny_config, tiny_model

NEW, PAD, LOOPS = 5, 2, 5
RULE = {"type": "rule_based", "min_delta": 0.25}
MODES = ("adaptive_sequence", "adaptive_token")


def without_end(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def looped(**settings: Any) -> Any:
    return without_end(tiny_model(tiny_config(trained_max_loops=LOOPS, **settings)).double())


def small(**settings: Any) -> Any:
    """A model of width 16 for tests of many requests."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return looped(**shape, num_prelude_blocks=1, num_coda_blocks=1, vocab_size=32, **settings)


@pytest.fixture(scope="module")
def shared() -> Any:
    """A model that no test changes."""
    return looped()


@pytest.fixture
def model() -> Any:
    return small()


def prompts(model: Any, lengths: tuple[int, ...] = (6, 4, 3)) -> tuple[Tensor, Tensor]:
    mask = left_padding(lengths)
    return token_ids(model, *mask.shape), mask


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
    settings = {"do_sample": False, "max_new_tokens": NEW, "return_loop_stats": True}
    return model.generate(ids, attention_mask=mask, **settings | kwargs)


@pytest.fixture
def ran() -> Iterator[list[Tensor]]:
    """What the core runs: for every loop the number of tokens ``[B]`` of each row, counted beside the driver."""
    seen: list[Tensor] = []
    plain = AdaptiveRun.advance

    def advance(self: AdaptiveRun, loop_index: int, active: Tensor) -> None:
        seen.append(active.sum(dim=1))
        plain(self, loop_index, active)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveRun, "advance", advance)
        yield seen


class Clock:
    """A clock that moves with every loop of the core."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every loop takes one millisecond, everything else no time."""
    made, plain = Clock(), AdaptiveRun.advance

    def advance(self: AdaptiveRun, loop_index: int, active: Tensor) -> None:
        made.now += 0.001
        plain(self, loop_index, active)

    monkeypatch.setattr(AdaptiveRun, "advance", advance)
    monkeypatch.setattr("cognexis.decoder.generation.RequestBudget", lambda limits: RequestBudget(limits, made))
    return made


# -- the result ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: Any, ids: Tensor, mask: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """New tokens and their loops ``[B, NEW]``, by forwards over a cache."""
    cache, new, counts, step = CognexisCache(model.config), [], [], ids
    for _ in range(NEW):
        output = model(step, attention_mask=mask, past_key_values=cache, **settings)
        loops = output.loop_counts
        counts.append(loops[:, -1] if loops.ndim == 2 else loops)
        step = output.logits[:, -1].argmax(-1, keepdim=True)
        new.append(step)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return torch.cat(new, dim=1), torch.stack(counts, dim=1)


ADAPTIVE: dict[str, dict[str, Any]] = {
    "rows by state": {"loop_mode": "adaptive_sequence", "scheduler": RULE},
    "tokens by state": {"loop_mode": "adaptive_token", "scheduler": RULE},
    "tokens by prediction": {
        "loop_mode": "adaptive_token",
        "scheduler": {"type": "rule_based", "min_delta": 0, "kl_threshold": 0.05},
    },
    "prefix": {"loop_mode": "adaptive_token", "halt_dependency": "prefix", "scheduler": RULE},
    "bounds": {"loop_mode": "adaptive_token", "scheduler": RULE, "min_loops": 2, "max_loops": 3},
    "a tier": {"loop_mode": "adaptive_token", "scheduler": RULE, "quality_tier": "thorough"},
    "loops by row": {"num_loops": torch.tensor([4, 1, 2])},
    "a policy": {"num_loops": 4, "cache_policy": "last_exited"},
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_generating_is_decoding_by_hand(shared: Any, name: str) -> None:
    ids, mask = prompts(shared)
    new, counts = by_hand(shared, ids, mask, **ADAPTIVE[name])
    output = generate(shared, ids, mask, **ADAPTIVE[name])
    assert type(output) is CognexisGenerateOutput
    assert torch.equal(output.sequences[:, ids.shape[1] :], new)
    assert torch.equal(output.loop_counts, counts)
    assert torch.equal(
        shared.generate(ids, attention_mask=mask, max_new_tokens=NEW, **ADAPTIVE[name]), output.sequences
    )


@pytest.mark.parametrize("name", [n for n in ADAPTIVE if n != "loops by row"])
def test_a_row_generates_the_same_alone_and_in_a_batch(shared: Any, name: str) -> None:
    ids, mask = prompts(shared)
    together = generate(shared, ids, mask, **ADAPTIVE[name])
    for row in range(3):
        start = int((mask[row] == 0).sum())
        alone = generate(shared, ids[row : row + 1, start:], **ADAPTIVE[name])
        assert torch.equal(together.sequences[row, start:], alone.sequences[0])
        assert torch.equal(together.loop_counts[row], alone.loop_counts[0])
        assert together.halt_reasons[row] == alone.halt_reasons[0]
        assert together.budget_used[row] == alone.budget_used[0]


def test_equal_loops_by_row_are_a_fixed_run(shared: Any) -> None:
    ids, mask = prompts(shared)
    fixed = generate(shared, ids, mask, num_loops=3)
    rows = generate(shared, ids, mask, num_loops=torch.tensor([3, 3, 3]))
    assert torch.equal(fixed.sequences, rows.sequences)
    for name in ("loop_counts", "effective_depths", "budget_used"):
        assert torch.equal(getattr(fixed, name), getattr(rows, name))
    assert fixed.halt_reasons == rows.halt_reasons and fixed.stop_reasons == rows.stop_reasons


@pytest.mark.parametrize("mode", MODES)
def test_without_a_cache_the_result_is_the_same(shared: Any, mode: str) -> None:
    ids, mask = prompts(shared)
    dependency = "token" if mode == "adaptive_token" else None
    settings = {"loop_mode": mode, "scheduler": RULE, "halt_dependency": dependency, "min_loops": 2}
    uncached = generate(shared, ids, mask, use_cache=False, **settings)
    if mode == "adaptive_token":
        cached = generate(shared, ids, mask, **settings)
        assert torch.equal(cached.sequences, uncached.sequences)
        assert torch.equal(cached.loop_counts, uncached.loop_counts)
    assert uncached.loop_counts.shape == (3, NEW) and (uncached.loop_counts >= 2).all()
    assert uncached.loop_diagnostics["cache_bytes"] is None


@pytest.mark.parametrize("dependency", [None, "prefix"])
@pytest.mark.parametrize("size, passes", [(2, 4), (3, 3)])
def test_a_prompt_may_be_read_in_chunks(shared: Any, dependency: str | None, size: int, passes: int) -> None:
    ids, mask = prompts(shared, (7, 5, 4))  # the last chunk is a single token
    settings = {"loop_mode": "adaptive_token", "halt_dependency": dependency, "scheduler": RULE}
    whole = generate(shared, ids, mask, **settings)
    chunked = generate(shared, ids, mask, prefill_chunk_size=size, **settings)
    assert torch.equal(chunked.sequences, whole.sequences)
    assert torch.equal(chunked.loop_counts, whole.loop_counts)
    assert chunked.loop_diagnostics["phases"]["prefill"]["passes"] == passes
    assert chunked.loop_diagnostics["cache_bytes"] == whole.loop_diagnostics["cache_bytes"], "loops of every token"


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_a_budget_of_loops_per_token_above_the_maximum_permits_extrapolation(shared: Any, way: str) -> None:
    ids, _ = prompts(shared, (4,))
    settings = {"num_loops": LOOPS + 2, "allow_extrapolation": True}
    if way == "forward":
        assert shared(ids, **settings).loop_counts.tolist() == [LOOPS + 2]
        return
    output = generate(shared, ids, max_loops_per_token=LOOPS + 3, **settings)
    assert output.loop_counts.unique().tolist() == [LOOPS + 2]
    with pytest.raises(InvalidConfigError, match=f"num_loops={LOOPS + 2}"):
        generate(shared, ids, max_loops_per_token=LOOPS + 1, **settings)


def test_a_prompt_may_be_embeddings(shared: Any) -> None:
    ids, _ = prompts(shared, (6,))
    settings = {"loop_mode": "adaptive_token", "scheduler": RULE}
    output = generate(shared, ids, **settings)
    embedded = shared.generate(
        inputs_embeds=shared.model.embed_tokens(ids), max_new_tokens=NEW, return_loop_stats=True, **settings
    )
    assert torch.equal(embedded.sequences, output.sequences[:, 6:])
    assert torch.equal(embedded.loop_counts, output.loop_counts)


def test_a_conversation_continues_its_cache(shared: Any) -> None:
    ids, _ = prompts(shared, (6,))
    first = generate(shared, ids, loop_mode="adaptive_token", scheduler=RULE, halt_dependency="token")
    longer = torch.cat((first.sequences, token_ids(shared, 1, 3, seed=7)), dim=1)
    settings = {"num_loops": 2, "output_logits": True}
    second = generate(shared, longer, past_key_values=first.past_key_values, **settings)
    assert second.loop_counts.tolist() == [[2] * NEW]
    assert first.past_key_values.get_seq_length() == 6 + NEW + 3 + NEW - 1


@pytest.mark.parametrize("mode", MODES)
def test_samples_are_reproducible(shared: Any, mode: str) -> None:
    ids, mask = prompts(shared)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        settings = {"do_sample": True, "num_return_sequences": 2, "loop_mode": mode, "scheduler": RULE}
        outputs.append(generate(shared, ids, mask, **settings))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[0].loop_counts, outputs[1].loop_counts)
    assert not torch.equal(outputs[0].sequences, outputs[2].sequences)
    assert outputs[0].loop_counts.shape == (6, NEW)


# -- where settings come from ----------------------------------------------------------------------------------------


def test_schedulers_are_named_described_or_given(shared: Any) -> None:
    ids, mask = prompts(shared)
    results = [
        generate(shared, ids, mask, loop_mode="adaptive_token", scheduler=scheduler)
        for scheduler in (None, "rule_based", {"type": "rule_based", "min_delta": 0.03}, RuleBasedScheduler())
    ]
    for result in results[1:]:
        assert torch.equal(result.loop_counts, results[0].loop_counts)
        assert result.loop_diagnostics["scheduler"] == results[0].loop_diagnostics["scheduler"]


def test_settings_may_stand_in_a_generation_config(shared: Any, model: Any) -> None:
    ids, mask = prompts(shared)
    settings = {"loop_mode": "adaptive_token", "scheduler": RULE, "min_loops": 2, "max_total_loops": 9}
    expected = generate(shared, ids, mask, **settings)
    given = GenerationConfig(max_new_tokens=NEW, pad_token_id=PAD, return_loop_stats=True, **settings)
    assert torch.equal(
        shared.generate(ids, attention_mask=mask, generation_config=given).loop_counts, expected.loop_counts
    )
    assert "budget_exhausted" in expected.stop_reasons
    ids, mask = prompts(model)
    expected = generate(model, ids, mask, **settings)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert torch.equal(generate(model, ids, mask).loop_counts, expected.loop_counts)
    assert generate(model, ids, mask, max_total_loops=100).stop_reasons == ["max_new_tokens"] * 3


def test_the_scheduler_of_the_checkpoint_decides_when_the_call_names_none(model: Any) -> None:
    ids, mask = prompts(model)
    expected = generate(model, ids, mask, loop_mode="adaptive_token", scheduler=RULE)
    assert len(expected.loop_counts.unique()) > 1
    model.scheduler_record = model.scheduler_record | {"scheduler": RULE}
    output = generate(model, ids, mask, loop_mode="adaptive_token")
    assert torch.equal(output.loop_counts, expected.loop_counts)
    assert output.loop_diagnostics["scheduler"]["min_delta"] == 0.25
    named = generate(model, ids, mask, loop_mode="adaptive_token", scheduler="rule_based")
    assert named.loop_diagnostics["scheduler"]["min_delta"] == 0.25
    described = generate(model, ids, mask, loop_mode="adaptive_token", scheduler={"type": "rule_based"})
    assert described.loop_diagnostics["scheduler"]["min_delta"] == 0.03


def test_the_dependency_of_the_checkpoint_holds_in_every_pass(model: Any) -> None:
    ids, mask = prompts(model)
    expected = generate(model, ids, mask, loop_mode="adaptive_token", scheduler=RULE, halt_dependency="row")
    calibrated = {"calibrated": {"halt_dependency": "row"}}
    model.scheduler_record = model.scheduler_record | {"scheduler": RULE, "value_head": calibrated}
    output = generate(model, ids, mask, loop_mode="adaptive_token")
    assert output.loop_diagnostics["halt_dependency"] == "row"
    assert output.loop_diagnostics["phases"] == expected.loop_diagnostics["phases"]
    assert output.loop_diagnostics["cache_bytes"] == expected.loop_diagnostics["cache_bytes"]
    prefix = generate(model, ids, mask, loop_mode="adaptive_token", halt_dependency="prefix")
    assert prefix.loop_diagnostics["cache_bytes"] != output.loop_diagnostics["cache_bytes"]


@pytest.mark.parametrize("mode", MODES)
def test_adaptive_runs_end_before_the_measured_overthinking_depth(model: Any, mode: str) -> None:
    ids, mask = prompts(model)
    never = {"type": "rule_based", "min_delta": 1e-12}
    model.scheduler_record = model.scheduler_record | {"overthinking_threshold": 3}
    output = generate(model, ids, mask, loop_mode=mode, scheduler=never)
    assert output.loop_counts.unique().tolist() == [3]
    assert output.loop_diagnostics["max_loops"] == 3 and output.loop_diagnostics["requested_loops"] == LOOPS
    assert generate(model, ids, mask, num_loops=4).loop_counts.unique().tolist() == [4]


@pytest.mark.parametrize("tier, low, high", [("fast", 1, 3), ("balanced", 1, 5), ("thorough", 3, 5)])
def test_a_tier_narrows_the_bounds_once(model: Any, tier: str, low: int, high: int) -> None:
    ids, mask = prompts(model)
    for min_delta, expected in ((1e9, low), (1e-12, high)):
        scheduler = {"type": "rule_based", "min_delta": min_delta}
        for extra in ({}, {"max_loops_per_token": LOOPS}, {"max_total_loops": 99}):
            settings = {"loop_mode": "adaptive_token", "quality_tier": tier, "scheduler": scheduler} | extra
            output = generate(model, ids, mask, **settings)
            assert output.loop_counts.unique().tolist() == [expected]
        facts = output.loop_diagnostics
        assert (facts["min_loops"], facts["max_loops"], facts["quality_tier"]) == (low, high, tier)


def test_aliases_are_the_arguments_that_they_stand_for(model: Any) -> None:
    ids, mask = prompts(model)
    names = {"max_loops": 3, "max_total_loops": 8, "max_new_tokens": 4}
    aliases = {"loop_budget": 3, "total_loop_budget": 8, "max_generated_tokens": 4}
    settings = {"loop_mode": "adaptive_token", "scheduler": RULE, "return_loop_stats": True}
    a, b = (model.generate(ids, attention_mask=mask, **settings, **given) for given in (names, aliases))
    assert torch.equal(a.sequences, b.sequences) and torch.equal(a.loop_counts, b.loop_counts)
    assert a.loop_diagnostics["max_loops"] == 3 and a.sequences.shape[1] <= 6 + 4
    for (alias, value), name in zip(aliases.items(), names, strict=True):
        with pytest.raises(InvalidConfigError, match=f"{alias}={value}: is {name}, which is given too") as caught:
            model.generate(ids, attention_mask=mask, **{alias: value, name: value})
        assert caught.value.path == alias


def test_loops_per_token_are_bounded(model: Any) -> None:
    ids, mask = prompts(model)
    never = {"type": "rule_based", "min_delta": 1e-12}
    output = generate(model, ids, mask, loop_mode="adaptive_token", scheduler=never, max_loops_per_token=2)
    assert output.loop_counts.unique().tolist() == [2] and output.stop_reasons == ["max_new_tokens"] * 3
    assert generate(model, ids, mask, max_loops_per_token=99).loop_counts.unique().tolist() == [
        model.config.default_loops
    ]
    with pytest.raises(InvalidConfigError, match="num_loops=4"):
        generate(model, ids, mask, num_loops=4, max_loops_per_token=3)


# -- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_golden_two_loops_with_a_budget_of_two_give_one_token(model: Any, rows: int) -> None:
    ids = token_ids(model, rows, 4)
    output = generate(model, ids, num_loops=2, max_total_loops=2, max_new_tokens=5)
    assert output.sequences.shape == (rows, 5)
    assert output.stop_reasons == ["budget_exhausted"] * rows
    assert output.budget_used.tolist() == [2] * rows
    assert torch.equal(output.sequences, generate(model, ids, num_loops=2, max_new_tokens=1).sequences)


def flops_of(model: Any, prompt: int, new: int, loops: int) -> int:
    """Recurrent operations of a row: a prompt, then tokens one by one."""
    first = prompt * core_flops_per_token(model.config, prompt)
    return loops * (first + sum(core_flops_per_token(model.config, prompt + i) for i in range(1, new)))


def bytes_of(model: Any, tokens: int, loops: int) -> int:
    return tokens * token_bytes(model.config, loops, 8)


@pytest.mark.parametrize("mode", ["fixed", *MODES])
@pytest.mark.parametrize("spare", [0, -1])
def test_every_budget_ends_a_text_and_keeps_it(model: Any, clock: Clock, mode: str, spare: int) -> None:
    """Budgets for exactly three tokens of three loops, or for a little less."""
    ids = token_ids(model, 1, 4)
    settings: dict[str, Any] = {"min_loops": 3, "max_loops": 3}
    settings |= {"num_loops": 3} if mode == "fixed" else {"loop_mode": mode, "scheduler": RULE}
    full = generate(model, ids, **settings)
    for name, needed in (
        ("max_total_loops", 9),
        ("max_recurrent_flops", flops_of(model, 4, 3, 3)),
        ("max_cache_memory_bytes", bytes_of(model, 4 + 2, 3)),
        ("max_wall_time_ms", 9.5),
    ):
        output = generate(model, ids, **settings, **{name: needed + spare})
        tokens = 3 if spare == 0 else 2
        assert output.stop_reasons == ["budget_exhausted"], name
        assert torch.equal(output.sequences, full.sequences[:, : 4 + tokens]), name
        assert output.loop_counts.tolist() == [[3] * tokens], name
        assert output.budget_used.tolist() == [3 * tokens], name


def test_a_budget_that_does_not_bind_changes_nothing(model: Any) -> None:
    ids, mask = prompts(model)
    for settings in ({"num_loops": 3}, ADAPTIVE["tokens by state"]):
        free = generate(model, ids, mask, **settings)
        ample = {"max_total_loops": 10**6, "max_recurrent_flops": 1e15, "max_wall_time_ms": 1e9}
        bound = generate(model, ids, mask, **settings, **ample, max_cache_memory_bytes=10**12)
        assert torch.equal(free.sequences, bound.sequences) and torch.equal(free.loop_counts, bound.loop_counts)
        assert bound.stop_reasons == ["max_new_tokens"] * 3


@pytest.mark.parametrize(
    "limits",
    [
        {"max_total_loops": 2},
        {"max_recurrent_flops": 10},
        {"max_cache_memory_bytes": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("extra", [{}, {"num_beams": 2}, {"prefill_chunk_size": 2}, {"use_cache": False}], ids=str)
def test_a_budget_too_small_for_one_token_is_refused_before_any_forward(
    model: Any, ran: list[Tensor], limits: dict[str, Any], extra: dict[str, Any]
) -> None:
    if "use_cache" in extra and "max_cache_memory_bytes" in limits:
        extra = {}
    ids, mask = prompts(model)
    with pytest.raises(BudgetExceededError, match="budget"):
        generate(model, ids, mask, loop_mode="adaptive_token", min_loops=3, **limits, **extra)
    assert not ran


def test_time_too_short_for_one_token_is_an_error(model: Any, clock: Clock) -> None:
    with pytest.raises(BudgetExceededError, match="max_wall_time_ms"):
        generate(model, token_ids(model, 1, 4), loop_mode="adaptive_token", min_loops=3, max_wall_time_ms=1.5)
    assert clock.now == pytest.approx(0.001)  # the second loop was not begun


def test_time_that_ends_within_a_token_keeps_the_tokens_before(model: Any, clock: Clock) -> None:
    ids = token_ids(model, 1, 4)
    slow = {"at": 7, "by": 1.0}
    plain = AdaptiveRun.advance

    def advance(self: AdaptiveRun, loop_index: int, active: Tensor) -> None:
        plain(self, loop_index, active)
        slow["at"] -= 1
        clock.now += slow["by"] if slow["at"] == 0 else 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveRun, "advance", advance)
        streamer = StepEventStreamer()
        settings = {"num_loops": 3, "min_loops": 3, "max_wall_time_ms": 500.0}
        output = generate(model, ids, streamer=streamer, **settings)
    assert torch.equal(output.sequences, generate(model, ids, num_loops=3, max_new_tokens=2).sequences)
    assert output.stop_reasons == ["budget_exhausted"] and output.budget_used.tolist() == [6]
    assert output.loop_diagnostics["phases"]["decode"]["passes"] == 1
    assert [(e.loop_count, e.stop_reason) for e in streamer.events] == [(3, None), (3, "budget_exhausted")]
    slow["at"] = 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveRun, "advance", advance)
        ids = model.generate(ids, max_new_tokens=9, do_sample=False, **settings)
    assert isinstance(ids, Tensor) and ids.shape == (1, 6)


def test_random_budgets_are_never_passed(model: Any, ran: list[Tensor], clock: Clock) -> None:
    check_random_budgets(model, ran, clock, 40)


@pytest.mark.slow
def test_two_hundred_random_budgets_are_never_passed(model: Any, ran: list[Tensor], clock: Clock) -> None:
    check_random_budgets(model, ran, clock, 200)


def check_random_budgets(model: Any, ran: list[Tensor], clock: Clock, requests: int) -> None:
    """Schedulers answer at random; what was run is counted beside the driver, and the statistics agree with it."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    seen: Counter[str] = Counter()
    for case in range(requests):
        rows = draw(1, 2)
        ids, mask = prompts(model, (draw(2, 5), draw(1, 5))[:rows])
        length = ids.shape[1]
        low = draw(1, 2)
        high = draw(low, LOOPS)
        settings: dict[str, Any] = {"min_loops": low, "max_loops": high, "max_new_tokens": draw(1, NEW)}
        mode = draw(0, 2)
        settings |= (
            {"num_loops": draw(low, high)} if mode == 2 else {"loop_mode": MODES[mode], "scheduler": Rogue(case)}
        )
        limits: dict[str, Any] = {}
        if draw(0, 1):
            limits["max_total_loops"] = draw(1, 14)
        if draw(0, 3) == 0:
            limits["max_recurrent_flops"] = draw(1, flops_of(model, length, NEW, 3))
        if draw(0, 3) == 0:
            limits["max_cache_memory_bytes"] = draw(1, rows * bytes_of(model, length + NEW, 3))
        if draw(0, 3) == 0:
            limits["max_wall_time_ms"] = draw(1, 14) - 0.5
        if draw(0, 3) == 0:
            limits["max_loops_per_token"] = draw(settings.get("num_loops", low), LOOPS)
        extra: dict[str, Any] = [{}, {"prefill_chunk_size": 2}, {"use_cache": False}][max(0, draw(-3, 2))]
        ran.clear()
        start = clock.now
        try:
            output = generate(model, ids, mask, **settings, **limits, **extra)
        except BudgetExceededError:
            assert limits
            seen["refused"] += 1
        else:
            counts = output.loop_counts
            assert (counts[counts > 0] >= low).all() and counts.max() <= high
            assert counts.max() <= limits.get("max_loops_per_token", LOOPS)
            assert (output.budget_used <= limits.get("max_total_loops", 10**9)).all()
            assert counts.shape[1] <= settings["max_new_tokens"]
            if output.loop_diagnostics.get("cache_bytes") is not None:
                assert output.loop_diagnostics["cache_bytes"] <= limits.get("max_cache_memory_bytes", 10**9)
            for row, reason in enumerate(output.stop_reasons):
                if reason == "max_new_tokens":
                    assert (counts[row] > 0).sum() == settings["max_new_tokens"]
                seen[reason] += 1
        applications = torch.stack(ran).gt(0).sum(dim=0) if ran else torch.zeros(rows)
        assert (applications <= limits.get("max_total_loops", 10**9)).all()
        wall = limits.get("max_wall_time_ms")
        assert wall is None or (clock.now - start) * 1000 <= wall + 1 + 1e-6
    assert set(seen) == {"refused", "budget_exhausted", "max_new_tokens"} and min(seen.values()) >= requests / 12


@pytest.mark.parametrize("limit", [4000, 6500, 20000])
def test_with_several_core_blocks_the_cache_keeps_its_limit_too(limit: int) -> None:
    model = small(num_recurrent_blocks=2, experimental_multi_block=True)
    ids = token_ids(model, 1, 4)
    settings = {"loop_mode": "adaptive_token", "scheduler": RULE, "max_loops": 3}
    try:
        output = generate(model, ids, max_cache_memory_bytes=limit, **settings)
    except BudgetExceededError:
        assert limit == 4000
    else:
        assert 0 < output.loop_diagnostics["cache_bytes"] <= limit
        assert output.stop_reasons == ["max_new_tokens" if limit == 20000 else "budget_exhausted"]


def test_operations_are_charged_without_a_prelude_too(ran: list[Tensor]) -> None:
    model = small()
    bare = without_end(tiny_model(tiny_config(trained_max_loops=LOOPS, num_prelude_blocks=0)).double())
    for each in (model, bare):
        ids = token_ids(each, 1, 4)
        needed = flops_of(each, 4, 3, 3)
        for limit, tokens in ((needed, 3), (needed - 1, 2)):
            output = generate(each, ids, num_loops=3, min_loops=3, max_recurrent_flops=limit)
            assert output.loop_counts.tolist() == [[3] * tokens]


def test_without_a_cache_operations_are_counted_for_the_whole_text(model: Any) -> None:
    ids = token_ids(model, 1, 4)
    passes = [3 * n * core_flops_per_token(model.config, n) for n in (4, 5, 6)]
    settings = {"num_loops": 3, "min_loops": 3, "use_cache": False}
    for limit, tokens in ((sum(passes), 3), (sum(passes) - 1, 2)):
        output = generate(model, ids, max_recurrent_flops=limit, **settings)
        assert output.loop_counts.tolist() == [[3] * tokens]
        assert output.stop_reasons == ["budget_exhausted"]


# -- rows that end ---------------------------------------------------------------------------------------------------


def first_end(rows: list[list[int]]) -> int:
    """A token that the first row writes early and the others never."""
    return next(t for t in rows[0][:3] if all(t not in other for other in rows[1:]))


@pytest.mark.parametrize("name", ["rows by state", "tokens by state", "loops by row"])
def test_an_ended_row_costs_nothing(shared: Any, ran: list[Tensor], name: str) -> None:
    ids, mask = prompts(shared)
    free = generate(shared, ids, mask, **ADAPTIVE[name])
    end = first_end(free.sequences[:, 6:].tolist())
    length = free.sequences[0, 6:].tolist().index(end) + 1
    ran.clear()
    output = generate(shared, ids, mask, eos_token_id=end, **ADAPTIVE[name])
    assert output.stop_reasons == ["eos_token", "max_new_tokens", "max_new_tokens"]
    assert output.sequences[0, 6:].tolist() == [*free.sequences[0, 6 : 6 + length].tolist(), *[PAD] * (NEW - length)]
    assert torch.equal(output.sequences[1:], free.sequences[1:])
    assert torch.equal(output.loop_counts[0, :length], free.loop_counts[0, :length])
    assert output.loop_counts[0, length:].tolist() == [0] * (NEW - length)
    assert output.effective_depths[0, length:].tolist() == [0] * (NEW - length)
    assert len(output.halt_reasons[0]) == length and torch.equal(output.loop_counts[1:], free.loop_counts[1:])
    assert output.budget_used.tolist() == torch.stack(ran).gt(0).sum(dim=0).tolist()
    assert output.budget_used[0] < free.budget_used[0] and torch.equal(output.budget_used[1:], free.budget_used[1:])


def test_one_row_may_run_out_of_budget_before_another(model: Any) -> None:
    ids = token_ids(model, 2, 4)
    output = generate(model, ids, num_loops=torch.tensor([4, 1]), max_total_loops=6)
    assert output.loop_counts.tolist() == [[4, 2, 0, 0, 0], [1] * 5]
    assert output.halt_reasons[0] == ["max_loops", "budget"]
    assert output.stop_reasons == ["budget_exhausted", "max_new_tokens"]
    assert output.budget_used.tolist() == [6, 5]
    assert output.sequences[0, 6:].tolist() == [PAD] * 3


class EveryCall(StoppingCriteria):
    """Ends all rows at its third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return torch.full((input_ids.shape[0],), self.calls >= 3)


@pytest.mark.parametrize("settings", [{"num_loops": 2}, ADAPTIVE["tokens by state"], {"max_total_loops": 99}], ids=str)
def test_a_callers_criterion_is_asked_once_per_token(model: Any, settings: dict[str, Any]) -> None:
    criterion = EveryCall()
    output = generate(model, token_ids(model, 2, 4), stopping_criteria=[criterion], **settings)
    assert output.sequences.shape == (2, 7) and criterion.calls == 3
    assert output.stop_reasons == ["cancelled"] * 2
    assert (output.loop_counts > 0).all()


# -- beams and streams -----------------------------------------------------------------------------------------------


@torch.no_grad()
def loops_along(model: Any, ids: Tensor, sequence: Tensor, **settings: Any) -> list[int]:
    """Loops behind each new token of a finished sequence, by decoding it again."""
    cache, counts, start = CognexisCache(model.config), [], 0
    for end in range(ids.shape[1], sequence.shape[0]):
        output = model(sequence[None, start:end], past_key_values=cache, **settings)
        counts.append(int(output.loop_counts.flatten()[-1]))
        start = end
    return counts


@pytest.mark.parametrize("name", ["rows by state", "tokens by state", "bounds"])
@pytest.mark.parametrize("returned", [1, 2])
def test_beams_report_the_loops_of_their_own_path(shared: Any, name: str, returned: int) -> None:
    ids, _ = prompts(shared, (5, 5))
    output = generate(shared, ids, num_beams=3, num_return_sequences=returned, **ADAPTIVE[name])
    assert type(output) is CognexisGenerateBeamOutput and output.sequences.shape == (2 * returned, 5 + NEW)
    for row, sequence in enumerate(output.sequences):
        expected = loops_along(shared, ids[:1], sequence, **ADAPTIVE[name])
        assert output.loop_counts[row].tolist() == expected
        assert len(output.halt_reasons[row]) == NEW
    assert output.stop_reasons == ["max_new_tokens"] * 2 * returned


def test_beams_of_equal_depth_are_those_of_a_fixed_run(shared: Any) -> None:
    ids, _ = prompts(shared, (5, 5))
    fixed = generate(shared, ids, num_beams=2, num_loops=3)
    for loops in (torch.tensor([3, 3]), torch.tensor(3)):
        rows = generate(shared, ids, num_beams=2, num_loops=loops)
        assert torch.equal(rows.sequences, fixed.sequences)
        assert rows.loop_counts.tolist() == fixed.loop_counts.tolist() == [[3] * NEW] * 2
        assert rows.budget_used.tolist() == fixed.budget_used.tolist() == [3 * NEW] * 2


def test_the_budget_of_beams_holds_along_every_path(model: Any) -> None:
    """Which beam runs deep changes from token to token, so a text may come through the deep one every time."""
    ids = token_ids(model, 2, 4)
    for seed in range(12):
        for total in (5, 8, 11):
            settings = {"loop_mode": "adaptive_token", "scheduler": Rogue(seed), "max_total_loops": total}
            output = generate(model, ids, num_beams=3, num_return_sequences=3, **settings)
            assert (output.budget_used <= total).all() and (output.loop_counts.sum(dim=1) <= total).all()
            assert set(output.stop_reasons) <= {"budget_exhausted", "max_new_tokens"}


def test_time_that_ends_within_a_token_keeps_the_best_beams(model: Any, clock: Clock) -> None:
    settings = {"num_beams": 3, "num_loops": 3, "min_loops": 3}
    ids = token_ids(model, 2, 4)
    plain = AdaptiveRun.advance
    loops: list[int] = []

    def advance(self: AdaptiveRun, loop_index: int, active: Tensor) -> None:
        plain(self, loop_index, active)
        loops.append(loop_index)
        clock.now += 9.0 if len(loops) == 7 else 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveRun, "advance", advance)
        output = generate(model, ids, max_wall_time_ms=5000.0, **settings)
    assert output.sequences.shape == (2, 6) and torch.equal(output.sequences[:, :4], ids)
    assert output.stop_reasons == ["budget_exhausted"] * 2
    assert output.loop_counts.tolist() == [[3, 3]] * 2 and output.budget_used.tolist() == [6, 6]


@pytest.mark.parametrize("name", ["rows by state", "tokens by state"])
def test_events_carry_loops_and_reasons(shared: Any, name: str) -> None:
    ids, _ = prompts(shared, (6,))
    streamer = StepEventStreamer()
    output = generate(shared, ids, streamer=streamer, **ADAPTIVE[name])
    events = streamer.events
    assert [e.token_id for e in events] == output.sequences[0, 6:].tolist()
    assert [e.loop_count for e in events] == output.loop_counts[0].tolist()
    assert [e.effective_depth for e in events] == output.effective_depths[0].tolist()
    assert [e.halt_reason for e in events] == output.halt_reasons[0] == ["min_delta"] * NEW
    assert [e.stop_reason for e in events] == [None] * (NEW - 1) + ["max_new_tokens"]


def test_the_last_event_of_a_spent_budget_says_so(model: Any) -> None:
    streamer = StepEventStreamer()
    generate(model, token_ids(model, 1, 4), streamer=streamer, num_loops=2, max_total_loops=5, return_loop_stats=False)
    assert [e.loop_count for e in streamer.events] == [2, 2, 1]
    assert [e.halt_reason for e in streamer.events] == ["max_loops", "max_loops", "budget"]
    assert streamer.events[-1].stop_reason == "budget_exhausted"


# -- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_of_an_adaptive_request(shared: Any, ran: list[Tensor]) -> None:
    ids, mask = prompts(shared)
    output = generate(shared, ids, mask, quality_tier="balanced", **ADAPTIVE["tokens by state"])
    counts, facts = output.loop_counts, output.loop_diagnostics
    assert len(counts.unique()) > 1
    assert torch.equal(output.effective_depths, counts + 3)
    assert output.budget_used.tolist() == torch.stack(ran).gt(0).sum(dim=0).tolist()
    assert facts["loop_mode"] == "adaptive_token" and facts["cache_policy"] == "depth_indexed"
    assert (facts["min_loops"], facts["max_loops"], facts["requested_loops"]) == (1, LOOPS, LOOPS)
    assert facts["extrapolated"] is False and facts["quality_tier"] == "balanced"
    assert facts["scheduler"]["min_delta"] == 0.25 and facts["halt_dependency"] == "prefix"
    phases = facts["phases"]
    assert phases["prefill"]["passes"] == 1 and phases["decode"]["passes"] == NEW - 1
    assert phases["decode"]["mean_loops"] == pytest.approx(counts[:, 1:].double().mean().item())
    assert phases["decode"]["max_loops"] == int(counts[:, 1:].max())
    assert facts["cache_bytes"] == output.past_key_values.memory_bytes() > 0
    summary = facts["scheduler_summary"]
    assert set(summary["reasons"]) <= {"min_delta", "max_loops"} and sum(summary["reasons"].values()) > 0
    assert summary["means"]["relative_delta"][0] > summary["means"]["relative_delta"][1] > 0


@pytest.mark.parametrize("policy", CACHE_POLICIES)
def test_the_policy_is_reported(model: Any, policy: str) -> None:
    ids, mask = prompts(model)
    output = generate(model, ids, mask, num_loops=3, cache_policy=policy)
    assert output.loop_diagnostics["cache_policy"] == policy
    assert output.loop_counts.unique().tolist() == [3]


def test_adaptive_requests_beyond_the_trained_depth_are_labelled() -> None:
    model = small()
    ids, mask = prompts(model)
    for min_delta, beyond in ((1e-12, True), (1e9, False)):
        scheduler = {"type": "rule_based", "min_delta": min_delta}
        settings = {"loop_mode": "adaptive_token", "scheduler": scheduler, "max_loops": 7, "allow_extrapolation": True}
        output = generate(model, ids, mask, **settings)
        assert (int(output.loop_counts.max()) > LOOPS) is beyond
        assert output.loop_diagnostics["extrapolated"] is beyond


# -- refusals --------------------------------------------------------------------------------------------------------

MIXED: dict[str, dict[str, Any]] = {
    "adaptive": {"loop_mode": "adaptive_token"},
    "rows": {"num_loops": torch.tensor([2])},
    "policy": {"cache_policy": "first_loop"},
    "budget": {"max_total_loops": 9},
}


@pytest.mark.parametrize("name", MIXED)
def test_what_needs_one_fixed_depth_is_refused(model: Any, ran: list[Tensor], name: str) -> None:
    ids = token_ids(model, 1, 4)
    for extra, words in (
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens: assisted decoding"),
        ({"assistant_model": model}, "assistant_model: assisted decoding"),
        ({"assistant_early_exit": 3}, "assistant_early_exit: assisted decoding"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate: .*fixed"),
        ({"cache_implementation": "static"}, "static.*dynamic cache"),
        ({"speculative_draft_loops": 1}, "speculative_draft_loops|draft"),
    ):
        with pytest.raises(InvalidConfigError, match=words):
            generate(model, ids, **MIXED[name], **extra)
    with pytest.raises(InvalidConfigError, match="one fixed number of loops"):
        model.generate_batch([[5, 6, 7]], **MIXED[name])
    assert not ran


@pytest.mark.parametrize(
    "settings, path",
    [
        *(
            ({name: value}, name)
            for name in ("max_total_loops", "max_loops_per_token")
            for value in (0, -1, 1.5, True)
        ),
        *(({name: float("nan")}, name) for name in ("max_recurrent_flops", "max_wall_time_ms")),
        ({"max_cache_memory_bytes": "1GB"}, "max_cache_memory_bytes"),
        ({"loop_mode": "adaptive_token", "num_loops": 2}, "num_loops"),
        ({"loop_mode": "adaptive_token", "scheduler": "value_head"}, "scheduler"),
        ({"loop_mode": "adaptive_token", "scheduler": "oracle"}, "scheduler"),
        ({"loop_mode": "adaptive_sequence", "halt_dependency": "token"}, "halt_dependency"),
        ({"halt_dependency": "prefix"}, "halt_dependency"),
        ({"quality_tier": "fast"}, "quality_tier"),
        ({"max_loops": "3", "max_loops_per_token": 2}, "max_loops"),
        ({"schedular": "rule_based"}, "schedular"),
        ({"max_total_loop": 3}, "max_total_loop"),
    ],
    ids=str,
)
def test_a_wrong_loop_setting_is_a_typed_error_before_any_loop(
    model: Any, ran: list[Tensor], settings: dict[str, Any], path: str
) -> None:
    with pytest.raises(InvalidConfigError, match=path) as caught:
        generate(model, token_ids(model, 1, 4), **settings)
    assert str(caught.value.path).startswith(path)
    assert not ran


def test_other_caches_and_row_counts_are_refused(model: Any) -> None:
    ids = token_ids(model, 2, 4)
    with pytest.raises(ShapeMismatchError, match=r"num_loops: .*\(2,\)"):
        generate(model, ids, num_loops=torch.tensor([2, 2, 2]))
    cache = DynamicCache(config=model.config)
    with pytest.raises(Exception, match="need a CognexisCache, got DynamicCache"):
        generate(model, ids, loop_mode="adaptive_token", past_key_values=cache)


def test_logits_that_are_not_finite_end_a_request(model: Any) -> None:
    def poison(module: Any, args: Any, state: Tensor) -> Tensor:
        return torch.where(torch.ones_like(state, dtype=torch.bool), torch.nan, state)

    handle = model.model.recurrent.loop_state.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match="logits"):
        generate(model, token_ids(model, 1, 4), loop_mode="adaptive_token")
    handle.remove()
    assert generate(model, token_ids(model, 1, 4), loop_mode="adaptive_token").sequences.shape == (1, 9)


def test_a_scheduler_that_fails_leaves_the_model_usable(model: Any) -> None:
    class Fails(RuleBasedScheduler):
        name = "fails"

        def rules(self, observation: Any, diagnostics: Any) -> Any:
            if observation.loops == 2:
                raise RuntimeError("no more")
            return super().rules(observation, diagnostics)

    ids = token_ids(model, 1, 4)
    before = generate(model, ids, loop_mode="adaptive_token")
    with pytest.raises(RuntimeError, match="no more"):
        generate(model, ids, loop_mode="adaptive_token", scheduler=Fails())
    assert torch.equal(generate(model, ids, loop_mode="adaptive_token").sequences, before.sequences)


@torch.no_grad()
def test_logits_of_generation_are_those_of_the_whole_text(shared: Any) -> None:
    """Under the prefix rule the finished text, read at once, gives the logits that generation saw."""
    ids, mask = prompts(shared)
    settings = {"loop_mode": "adaptive_token", "halt_dependency": "prefix", "scheduler": RULE}
    output = generate(shared, ids, mask, output_logits=True, **settings)
    longer = torch.cat((mask, torch.ones(3, NEW - 1, dtype=mask.dtype)), dim=1)
    whole = shared(output.sequences[:, :-1], attention_mask=longer, **settings)
    assert_same(torch.stack(output.logits, dim=1), whole.logits[:, 5:].float(), LOOPS)  # transformers keeps float32
    assert torch.equal(whole.loop_counts[:, 5:], output.loop_counts)
