"""A forward whose tokens run different numbers of loops: one result by every way, and what it refuses."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cognexis import CognexisCache
from cognexis.decoder.adaptive_run import AdaptiveRun
from cognexis.decoder.inputs import default_positions
from cognexis.decoder.masks import build_masks, with_memory
from cognexis.errors import CacheError, InvalidConfigError, NonFiniteError, ShapeMismatchError
from cognexis.looping.options import CACHE_POLICIES
from cognexis.looping.schedulers.oracle import OracleScheduler
from tests.batteries.invariance import CONFIGURATIONS, assert_same, left_padding, token_ids
from tests.batteries.scripted_schedulers import ByTable
from tests.batteries.tiny import tiny_config, tiny_model

LENGTHS = [9, 7, 4]
CHUNKS = [4, 1, 3, 1]
LOOPS = 5


def looped(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    return tiny_model(tiny_config(trained_max_loops=LOOPS, **settings)).to(dtype)


@pytest.fixture(scope="module")
def shared() -> Any:
    """A model that no test changes."""
    return looped()


def text(model: Any, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, left-padded mask and random depths of the real tokens, 0 at padding."""
    mask = left_padding(lengths)
    generator = torch.Generator().manual_seed(seed)
    depths = torch.randint(1, LOOPS + 1, mask.shape, generator=generator) * mask
    return token_ids(model, *mask.shape, seed=seed), mask, depths


@torch.no_grad()
def by_depths(model: Any, ids: Tensor, mask: Tensor, depths: Tensor, compaction: str = "exact", **kwargs: Any) -> Any:
    """One forward in which each token runs as often as the table says."""
    model.model.compaction = compaction
    settings = {"loop_mode": "adaptive_token", "halt_dependency": "token", "scheduler": ByTable(depths)}
    output = model(ids, attention_mask=mask, **settings | {"use_cache": False} | kwargs)
    model.model.compaction = "auto"
    return output


@torch.no_grad()
def recomputed(model: Any, ids: Tensor, mask: Tensor, depths: Tensor) -> Tensor:
    """Logits by the definition: all tokens in every loop, and a token keeps its state after its own depth."""
    body = model.model
    hidden = body.embed_tokens(ids) * model.config.embedding_scale
    positions = default_positions(mask, None, None, ids.shape[1], ids.device)
    around = {"position_embeddings": body.rotary_emb(hidden, position_ids=positions), "position_ids": positions}
    masks = build_masks(model.config, hidden, mask, None, positions, None)
    h0 = body.prelude(hidden, masks=masks, past_key_values=None, **around)
    memories = body.recurrent.memories(h0, around["position_embeddings"], None)
    state = body.recurrent.initial_state(h0, positions)
    for index in range(int(depths.max())):
        update, _ = body.recurrent.loop(state, h0, index, with_memory(masks, model.config), memories, **around)
        state = torch.where((index < depths)[..., None], update, state)
    return model.lm_head(body.final_norm(body.coda(state, masks=masks, past_key_values=None, **around)))


@torch.no_grad()
def in_chunks(
    model: Any, ids: Tensor, mask: Tensor, depths: Tensor, cache: Any, compaction: str = "exact", **kwargs: Any
) -> Tensor:
    """Logits of all tokens, fed to a cache in chunks."""
    scheduler, start, pieces = ByTable(depths), 0, []
    for size in CHUNKS:
        end = start + size
        settings = {"past_key_values": cache, "use_cache": True, "scheduler": scheduler} | kwargs
        output = by_depths(model, ids[:, start:end], mask[:, :end], depths, compaction, **settings)
        assert torch.equal(output.loop_counts, depths[:, start:end])
        pieces.append(output.logits)
        start = end
    return torch.cat(pieces, dim=1)


# -- one result by every way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_way_of_computing_mixed_depths_gives_the_definition(name: str) -> None:
    model = looped(**CONFIGURATIONS[name])
    ids, mask, depths = text(model)
    real = mask.bool()
    expected = recomputed(model, ids, mask, depths)[real]
    for compaction in ("off", "exact"):
        output = by_depths(model, ids, mask, depths, compaction)
        assert torch.equal(output.loop_counts, depths)
        assert_same(output.logits[real], expected, LOOPS, f"compaction {compaction}")
    cached = in_chunks(model, ids, mask, depths, CognexisCache(model.config))
    assert_same(cached[real], expected, LOOPS, "cache")


@pytest.mark.parametrize("compaction, form", [("off", "compact"), ("off", "reference"), ("exact", "reference")])
@pytest.mark.parametrize("name", ["linear_injection", "sliding_core", "core_of_two_blocks"])
def test_storage_and_compaction_do_not_show(name: str, compaction: str, form: str) -> None:
    model = looped(**CONFIGURATIONS[name])
    ids, mask, depths = text(model)
    cache = CognexisCache(model.config, mixed_depth=True, depth_form=form)
    cached = in_chunks(model, ids, mask, depths, cache, compaction)
    assert_same(cached[mask.bool()], recomputed(model, ids, mask, depths)[mask.bool()], LOOPS)


@pytest.mark.parametrize("seed", range(3))
def test_single_precision_stays_within_its_tolerance(seed: int) -> None:
    model = looped(torch.float32)
    ids, mask, depths = text(model, seed=seed)
    real = mask.bool()
    expected = recomputed(model, ids, mask, depths)[real]
    assert_same(by_depths(model, ids, mask, depths).logits[real], expected, LOOPS)
    assert_same(in_chunks(model, ids, mask, depths, CognexisCache(model.config))[real], expected, LOOPS)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_backends_of_attention_agree(backend: str) -> None:
    model = looped()
    ids, mask, depths = text(model)
    expected = recomputed(model, ids, mask, depths)
    model.set_attn_implementation(backend)
    for compaction in ("off", "exact"):
        logits = by_depths(model, ids, mask, depths, compaction).logits
        assert_same(logits[mask.bool()], expected[mask.bool()], LOOPS, compaction)
    cached = in_chunks(model, ids, mask, depths, CognexisCache(model.config))
    assert_same(cached[mask.bool()], expected[mask.bool()], LOOPS, "cache")


def test_right_padding_and_no_mask_work_too(shared: Any) -> None:
    ids, mask, depths = text(shared)
    right, flipped = mask.flip(1), depths.flip(1)
    logits = by_depths(shared, ids, right, flipped).logits
    assert_same(logits[right.bool()], recomputed(shared, ids, right, flipped)[right.bool()], LOOPS)
    full = depths.clamp(min=1)
    everything = torch.ones_like(mask)
    assert_same(by_depths(shared, ids, None, full).logits, recomputed(shared, ids, everything, full), LOOPS)


def test_packed_documents_are_apart(shared: Any) -> None:
    ids, _, depths = text(shared, [9])
    numbers = torch.tensor([[0] * 4 + [1] * 2 + [2] * 3])
    for compaction in ("off", "exact"):
        packed = by_depths(shared, ids, None, depths, compaction, document_ids=numbers)
        assert packed.past_key_values is None
        pieces = [
            recomputed(shared, ids[:, a:b], torch.ones(1, b - a, dtype=torch.long), depths[:, a:b])
            for a, b in ((0, 4), (4, 6), (6, 9))
        ]
        assert_same(packed.logits, torch.cat(pieces, dim=1), LOOPS, compaction)


@pytest.mark.parametrize("name", ["linear_injection", "core_of_two_blocks", "attention_memory"])
@torch.no_grad()
def test_the_same_number_for_every_row_is_the_plain_fixed_run(name: str) -> None:
    model = looped(**CONFIGURATIONS[name])
    ids, mask, _ = text(model)
    for loops in (1, 3, LOOPS):
        plain = model(ids, attention_mask=mask, num_loops=loops)
        rows = model(ids, attention_mask=mask, num_loops=torch.full((3,), loops))
        assert torch.equal(plain.logits[mask.bool()], rows.logits[mask.bool()])
        assert torch.equal(plain.loop_counts, rows.loop_counts) and rows.loop_counts.tolist() == [loops] * 3
        token = token_ids(model, 3, 1, seed=9)
        longer = torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), dim=1)
        settings = {"attention_mask": longer}
        a = model(token, past_key_values=plain.past_key_values, num_loops=loops, **settings).logits
        b = model(token, past_key_values=rows.past_key_values, num_loops=torch.full((3,), loops), **settings).logits
        assert_same(b, a, loops, "decoding")


@torch.no_grad()
def test_rows_of_different_depths_are_those_of_fixed_runs(shared: Any) -> None:
    ids, mask, _ = text(shared)
    loops = torch.tensor([2, 5, 1])
    output = shared(ids, attention_mask=mask, num_loops=loops, return_loop_stats=True)
    assert torch.equal(output.loop_counts, loops) and output.halt_reasons == ["max_loops"] * 3
    assert output.loop_diagnostics.executed_loops == 5
    for row, count in enumerate(loops.tolist()):
        alone = shared(ids[row : row + 1], attention_mask=mask[row : row + 1], num_loops=count).logits
        real = mask[row].bool()
        assert_same(output.logits[row, real], alone[0, real], count, f"row {row}")


# -- a row alone and in a batch --------------------------------------------------------------------------------------

RULES: dict[str, dict[str, Any]] = {
    "state": {"type": "rule_based", "min_delta": 0.25},
    "prediction": {"type": "rule_based", "min_delta": 0, "kl_threshold": 0.05},
    "confidence": {"type": "rule_based", "min_delta": 0, "confidence_threshold": 0.15},
    "both": {"type": "rule_based", "min_delta": 0, "kl_threshold": 0.03, "confidence_threshold": 0.15},
}
MODES = [("adaptive_sequence", None), *(("adaptive_token", d) for d in (None, "token", "prefix", "row"))]


@torch.no_grad()
def adaptive(model: Any, ids: Tensor, mask: Tensor | None, mode: str, dependency: str | None, **kwargs: Any) -> Any:
    return model(ids, attention_mask=mask, loop_mode=mode, halt_dependency=dependency, **kwargs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode, dependency", MODES)
def test_a_row_is_the_same_alone_and_in_a_batch(shared: Any, mode: str, dependency: str | None, rule: str) -> None:
    ids, mask, _ = text(shared, [9, 7, 4, 8])
    settings = {"scheduler": RULES[rule], "return_loop_stats": True}
    together = adaptive(shared, ids, mask, mode, dependency, **settings)
    for row in range(4):
        start = int((mask[row] == 0).sum())
        alone = adaptive(shared, ids[row : row + 1, start:], None, mode, dependency, **settings)
        assert_same(together.logits[row, start:], alone.logits[0], LOOPS, f"row {row}")
        if mode == "adaptive_sequence":
            assert together.loop_counts[row] == alone.loop_counts[0]
            assert together.halt_reasons[row] == alone.halt_reasons[0]
        else:
            assert torch.equal(together.loop_counts[row, start:], alone.loop_counts[0])
            assert together.halt_reasons[row][start:] == alone.halt_reasons[0]
            assert together.halt_reasons[row][:start] == ["forced"] * start
            assert (together.loop_counts[row, :start] == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_rules_of_these_tests_really_mix_depths(shared: Any, rule: str) -> None:
    ids, mask, _ = text(shared, [9, 7, 4, 8])
    counts = adaptive(shared, ids, mask, "adaptive_token", "token", scheduler=RULES[rule]).loop_counts
    assert len(counts[mask.bool()].unique()) >= 2


def test_a_token_waits_for_those_before_it_and_a_row_for_all(shared: Any) -> None:
    ids, mask, _ = text(shared, [11, 8])
    token, prefix, row = (
        adaptive(shared, ids, mask, "adaptive_token", d, scheduler=RULES["state"]).loop_counts
        for d in ("token", "prefix", "row")
    )
    assert (prefix >= token).all() and (prefix[:, 1:] >= prefix[:, :-1]).all()
    assert [len(r.unique()) for r in (row[0], row[1, 3:])] == [1, 1]
    assert (row.amax(dim=1) >= prefix.amax(dim=1)).all()
    default = adaptive(shared, ids, mask, "adaptive_token", None, scheduler=RULES["state"]).loop_counts
    assert torch.equal(default, prefix)


@pytest.mark.parametrize("rule", ["state", "prediction"])
def test_adaptive_rows_are_judged_by_their_largest_real_token(shared: Any, rule: str) -> None:
    ids, mask, _ = text(shared, [11, 8, 5])
    rows = adaptive(shared, ids, mask, "adaptive_sequence", None, scheduler=RULES[rule])
    tokens = adaptive(shared, ids, mask, "adaptive_token", "row", scheduler=RULES[rule])
    assert rows.loop_counts.tolist() == tokens.loop_counts.amax(dim=1).tolist()
    assert torch.equal(rows.logits[mask.bool()], tokens.logits[mask.bool()])


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["adaptive_sequence", "adaptive_token"])
def test_a_value_head_decides_alike_alone_and_in_a_batch(mode: str, kind: str) -> None:
    settings = {"kind": kind, "bottleneck_size": 8, "max_loops_embedded": 5, "features": ["entropy"]}
    model = looped(value_head=settings | {"output_kind": "continue_logit"})
    scheduler = {"type": "value_head", "output_kind": "continue_logit", "gain_threshold": 0.4}
    ids, mask, _ = text(model, [9, 7, 4, 8])
    together = adaptive(model, ids, mask, mode, None, scheduler=scheduler, return_loop_stats=True)
    of_rows = together.loop_counts if mode == "adaptive_sequence" else together.loop_counts[:, -1]
    assert len(of_rows.unique()) > 1 and together.loop_diagnostics.num_probes > 1
    for row in range(4):
        start = int((mask[row] == 0).sum())
        alone = adaptive(model, ids[row : row + 1, start:], None, mode, None, scheduler=scheduler)
        assert_same(together.logits[row, start:], alone.logits[0], LOOPS, f"row {row}")
        counts = together.loop_counts[row]
        assert torch.equal(counts if mode == "adaptive_sequence" else counts[start:], alone.loop_counts[0])


def test_what_padding_holds_changes_no_decision(shared: Any) -> None:
    ids, mask, _ = text(shared, [9, 4])
    other = torch.where(mask.bool(), ids, (ids + 7) % 64)
    for mode, dependency in MODES:
        a, b = (adaptive(shared, x, mask, mode, dependency, scheduler=RULES["state"]) for x in (ids, other))
        assert torch.equal(a.loop_counts, b.loop_counts)
        assert torch.equal(a.logits[mask.bool()], b.logits[mask.bool()])


def test_a_row_of_padding_only_runs_nothing(shared: Any) -> None:
    ids, mask, _ = text(shared, [5, 4])
    mask[1] = 0
    for mask_ in (mask, torch.zeros_like(mask)):
        output = adaptive(shared, ids, mask_, "adaptive_token", None, scheduler=RULES["state"])
        assert (output.loop_counts[mask_ == 0] == 0).all() and torch.isfinite(output.logits).all()


# -- causality -------------------------------------------------------------------------------------------------------


def depths_before_and_after_a_change(model: Any, mode: str, dependency: str | None, compaction: str) -> Any:
    """Outputs of a text and of texts that differ from it in one token; and which tokens stand before that one."""
    length = 9
    ids = token_ids(model, 1, length).expand(length, -1).contiguous()
    changed = ids.clone()
    changed.diagonal().copy_((ids.diagonal() + 1) % model.config.vocab_size)
    model.model.compaction = compaction
    outputs = [adaptive(model, x, None, mode, dependency, scheduler=RULES["state"]) for x in (ids, changed)]
    model.model.compaction = "auto"
    return *outputs, torch.ones(length, length, dtype=torch.bool).tril(-1)


@pytest.mark.parametrize("compaction", ["off", "exact"])
@pytest.mark.parametrize("dependency", ["token", "prefix"])
def test_later_tokens_change_neither_depths_nor_logits(shared: Any, dependency: str, compaction: str) -> None:
    a, b, before = depths_before_and_after_a_change(shared, "adaptive_token", dependency, compaction)
    assert torch.equal(a.loop_counts[before], b.loop_counts[before])
    if compaction == "off":
        assert torch.equal(a.logits[before], b.logits[before])
    else:  # other tokens are gathered together, which moves the last bits
        assert_same(a.logits[before], b.logits[before], LOOPS)
    assert not torch.equal(a.loop_counts, b.loop_counts), "the change itself must be visible"


@pytest.mark.parametrize("mode, dependency", [("adaptive_token", "row"), ("adaptive_sequence", None)])
def test_row_rules_let_later_tokens_decide_about_earlier_ones(shared: Any, mode: str, dependency: str | None) -> None:
    a, b, before = depths_before_and_after_a_change(shared, mode, dependency, "exact")
    assert not torch.equal(a.loop_counts, b.loop_counts)
    assert not torch.allclose(a.logits[before], b.logits[before])


@torch.no_grad()
def adaptive_in_chunks(model: Any, ids: Tensor, mask: Tensor, rule: str, cache: Any) -> tuple[Tensor, Tensor]:
    """Loops and logits of a text fed to a cache in chunks, under the prefix rule."""
    start, counts, logits = 0, [], []
    for size in CHUNKS:
        end = start + size
        settings = {"past_key_values": cache, "scheduler": RULES[rule]}
        output = adaptive(model, ids[:, start:end], mask[:, :end], "adaptive_token", "prefix", **settings)
        counts.append(output.loop_counts)
        logits.append(output.logits)
        start = end
    return torch.cat(counts, dim=1), torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", ["linear_injection", "sliding_window"])
def test_prefix_halting_in_chunks_is_that_of_the_whole_text(name: str) -> None:
    model = looped(**CONFIGURATIONS[name])
    ids, mask, _ = text(model)
    whole = adaptive(model, ids, mask, "adaptive_token", "prefix", scheduler=RULES["state"])
    counts, logits = adaptive_in_chunks(model, ids, mask, "state", CognexisCache(model.config))
    assert torch.equal(counts, whole.loop_counts)
    assert_same(logits[mask.bool()], whole.logits[mask.bool()], LOOPS)


def test_keys_that_are_kept_beyond_the_window_are_not_seen() -> None:
    """The rule looks at predictions, so coda and head run on intermediate states against the cache."""
    model = looped(**CONFIGURATIONS["sliding_window"])
    ids, mask, _ = text(model)
    plain, recording = CognexisCache(model.config), CognexisCache(model.config, mixed_depth=True)
    recording.activate_past_recording()
    results = [adaptive_in_chunks(model, ids, mask, "prediction", cache) for cache in (plain, recording)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][mask.bool()], results[1][1][mask.bool()])
    assert recording.memory_bytes() > plain.memory_bytes()


def test_a_halted_token_stays_visible(shared: Any) -> None:
    ids, mask, _ = text(shared, [6])
    depths = torch.tensor([[1, 4, 4, 4, 4, 4]])
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 64
    a, b = (by_depths(shared, x, mask, depths).logits for x in (ids, changed))
    assert ((a - b)[0, 1:].abs().amax(dim=-1) > 1e-3).all()
    deeper = by_depths(shared, ids, mask, depths.clamp(min=2)).logits
    assert ((a - deeper)[0, 1:].abs().amax(dim=-1) > 1e-6).all(), "later tokens see which state was frozen"


# -- states that stop, and what is computed --------------------------------------------------------------------------


class TimesTen(nn.Module):
    """A core whose loop multiplies its state by ten."""

    config = SimpleNamespace(first_loop_slot=0, state_retention="all", selected_states=[])
    blocks = [None]
    state_layer = None

    def memories(self, *args: Any) -> list[None]:
        return [None]

    def initial_state(self, h0: Tensor, position_ids: Tensor) -> Tensor:
        return h0

    def loop(self, state: Tensor, *args: Any, past_key_values: Any, **kwargs: Any) -> tuple[Tensor, None]:
        past_key_values.update(state[:, None], state[:, None], 0)
        return state * 10, None

    def frozen_keys(self, state: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return state[:, None], state[:, None]

    def loop_state(self, state: Tensor) -> Tensor:
        return state


@pytest.mark.parametrize("compaction", ["off", "exact"])
def test_golden_of_one_update(compaction: str) -> None:
    h0 = torch.tensor([[[1.0], [2.0], [3.0]]])
    angles = torch.zeros(1, 3, 1)
    shared = {"position_embeddings": (angles, angles), "position_ids": torch.arange(3)[None]}
    masks = {"full_attention": torch.zeros(1, 1, 3, 3)}
    core: Any = TimesTen()
    with torch.no_grad():
        run = AdaptiveRun(core, h0, masks, shared, torch.ones(1, 3, dtype=torch.bool), compaction=compaction)
        run.advance(0, torch.tensor([[True, True, False]]))
    assert run.state.flatten().tolist() == [10.0, 20.0, 3.0]
    assert run.computed_tokens == (3 if compaction == "off" else 2)


@pytest.mark.parametrize("compaction", ["off", "exact"])
def test_frozen_states_do_not_move_by_a_bit(compaction: str) -> None:
    model = looped(state_retention="all")
    ids, mask, depths = text(model)
    output = by_depths(model, ids, mask, depths, compaction)
    assert len(output.loop_states) == LOOPS
    for loop, (before, after) in enumerate(zip(output.loop_states, output.loop_states[1:], strict=False), start=2):
        frozen = depths < loop
        assert torch.equal(after[frozen], before[frozen])
        moved = (after != before).any(dim=-1)
        assert moved[~frozen].all()


def test_the_compact_form_computes_no_more_than_the_active_rows(shared: Any) -> None:
    ids, mask, _ = text(shared, [9, 9, 9])
    settings = {"scheduler": RULES["state"], "return_loop_stats": True}
    output = adaptive(shared, ids, mask, "adaptive_sequence", None, **settings)
    assert len(output.loop_counts.unique()) > 1
    facts = output.loop_diagnostics
    assert facts.computed_tokens == 9 * int(output.loop_counts.sum()) == int(facts.active.sum())


def test_the_compact_form_computes_little_more_than_the_active_tokens(shared: Any) -> None:
    ids, mask, depths = text(shared)
    facts = {
        form: by_depths(shared, ids, mask, depths, form, return_loop_stats=True).loop_diagnostics
        for form in ("off", "exact")
    }
    active = [[int((row >= loop).sum()) for row in depths] for loop in range(1, LOOPS + 1)]
    assert sum(map(sum, active)) <= facts["exact"].computed_tokens <= 1.05 * sum(map(sum, active))
    assert facts["off"].computed_tokens == LOOPS * mask.numel()
    for form in facts.values():
        assert form.active.tolist() == [sum(row) for row in active]
        assert form.histogram.tolist() == torch.bincount(depths[mask.bool()]).tolist()
        assert form.halt_counts == {"max_loops": int((depths == LOOPS).sum()), "value_gain": int(
            ((depths > 0) & (depths < LOOPS)).sum()), "forced": int((mask == 0).sum())}  # fmt: skip


def test_diagnostics_describe_an_adaptive_forward(shared: Any) -> None:
    ids, mask, _ = text(shared)
    output = adaptive(shared, ids, mask, "adaptive_token", None, scheduler=RULES["prediction"], return_loop_stats=True)
    facts = output.loop_diagnostics
    assert facts.loop_mode == "adaptive_token" and facts.halt_dependency == "prefix"
    assert facts.scheduler["type"] == "rule_based" and facts.scheduler["kl_threshold"] == 0.05
    assert facts.cache_policy == "depth_indexed" and facts.extrapolated is False
    assert facts.executed_loops == int(output.loop_counts.max()) and facts.requested_loops == LOOPS
    assert facts.num_probes == facts.executed_loops == len(facts.signals["prediction_change"])
    assert output.effective_depth.tolist() == (output.loop_counts + 3).tolist()
    assert [[len(row) for row in output.halt_reasons]] == [[9] * 3]


def test_without_statistics_reasons_stay_codes(shared: Any) -> None:
    ids, mask, _ = text(shared)
    output = adaptive(shared, ids, mask, "adaptive_token", None, scheduler=RULES["state"])
    assert output.halt_reasons is None and output.loop_diagnostics is None
    assert output.halt_codes.dtype == torch.int8 and output.halt_codes.shape == ids.shape


@pytest.mark.parametrize("min_loops, max_loops", [(1, 1), (2, 3), (4, 5)])
@pytest.mark.parametrize("mode, dependency", MODES)
def test_bounds_of_a_call_hold(shared: Any, mode: str, dependency: str | None, min_loops: int, max_loops: int) -> None:
    ids, mask, _ = text(shared)
    for min_delta in (1e-9, 0.25, 1e9):
        counts = adaptive(
            shared, ids, mask, mode, dependency, min_loops=min_loops, max_loops=max_loops,
            scheduler={"type": "rule_based", "min_delta": min_delta},
        ).loop_counts  # fmt: skip
        real = counts if mode == "adaptive_sequence" else counts[mask.bool()]
        assert real.min() >= min_loops and real.max() <= max_loops
        if min_delta != 0.25:
            assert real.unique().tolist() == [max_loops if min_delta < 1 else min_loops]


@torch.no_grad()
def test_adaptive_runs_may_go_beyond_what_was_trained_when_allowed(shared: Any) -> None:
    ids, mask, _ = text(shared)
    never = {"type": "rule_based", "min_delta": 1e-12}
    settings = {"max_loops": 8, "allow_extrapolation": True, "scheduler": never, "return_loop_stats": True}
    output = adaptive(shared, ids, mask, "adaptive_token", "token", **settings)
    assert output.loop_diagnostics.extrapolated and int(output.loop_counts.max()) == 8
    fixed = shared(ids, attention_mask=mask, num_loops=8, allow_extrapolation=True)
    assert_same(output.logits[mask.bool()], fixed.logits[mask.bool()], 8)


# -- cache policies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [p for p in CACHE_POLICIES if p != "depth_indexed"])
def test_approximate_policies_run_and_differ(policy: str) -> None:
    model = looped(kv_slots=2, num_prelude_blocks=1)
    ids, mask, depths = text(model)
    cache = CognexisCache(model.config)
    logits = in_chunks(model, ids, mask, depths, cache, cache_policy=policy)
    exact = in_chunks(model, ids, mask, depths, full := CognexisCache(model.config))
    assert torch.isfinite(logits).all()
    assert (logits - exact)[mask.bool()].abs().max() > 1e-3
    assert cache.memory_bytes() < full.memory_bytes()
    dense = in_chunks(model, ids, mask, depths, CognexisCache(model.config), "off", cache_policy=policy)
    assert_same(logits[mask.bool()], dense[mask.bool()], LOOPS, "compaction")


@pytest.mark.parametrize("policy", ["last_exited", "modulo_k"])
def test_within_one_call_only_sharing_the_first_loop_is_approximate(shared: Any, policy: str) -> None:
    ids, mask, depths = text(shared)
    exact = by_depths(shared, ids, mask, depths).logits
    assert torch.equal(by_depths(shared, ids, mask, depths, cache_policy=policy, use_cache=True).logits, exact)
    first = by_depths(shared, ids, mask, depths, cache_policy="first_loop", use_cache=True).logits
    assert (first - exact)[mask.bool()].abs().max() > 1e-3


def test_a_policy_with_room_for_all_loops_is_exact_at_equal_depths() -> None:
    model = looped(kv_slots=LOOPS)
    ids, mask, _ = text(model)
    depths = LOOPS * mask
    exact = recomputed(model, ids, mask, depths)
    for policy in ("last_exited", "modulo_k"):
        logits = in_chunks(model, ids, mask, depths, CognexisCache(model.config), cache_policy=policy)
        assert_same(logits[mask.bool()], exact[mask.bool()], LOOPS, policy)


@torch.no_grad()
def test_a_cache_serves_one_policy(shared: Any) -> None:
    ids, _, depths = text(shared, [6])
    for held in CACHE_POLICIES:
        output = by_depths(shared, ids, None, depths, cache_policy=held, use_cache=True)
        assert output.past_key_values.policy.name == held
        for asked in CACHE_POLICIES:
            if asked != held:
                with pytest.raises(CacheError, match=f"holds {held} entries, the call needs {asked}"):
                    shared(ids[:, :1], past_key_values=output.past_key_values, cache_policy=asked)


@torch.no_grad()
def test_a_fixed_cache_does_not_serve_mixed_depths(shared: Any) -> None:
    ids, _, _ = text(shared, [6])
    fixed = shared(ids, num_loops=3).past_key_values
    with pytest.raises(CacheError, match=r"keys of 3 loops for every token.*reset\(\)"):
        shared(ids[:, :1], past_key_values=fixed, loop_mode="adaptive_token")
    fixed.reset()
    shared(ids[:, :1], past_key_values=fixed, loop_mode="adaptive_token")
    assert fixed.policy is not None


def test_other_caches_are_refused_for_mixed_depths(shared: Any) -> None:
    ids, _, _ = text(shared, [6])
    for cache, error, words in (
        (DynamicCache(config=shared.config), CacheError, "need a CognexisCache, got DynamicCache"),
        (CognexisCache(shared.config, "static", max_cache_len=9), InvalidConfigError, "static.*dynamic cache"),
    ):
        for settings in (
            {"loop_mode": "adaptive_token"},
            {"num_loops": torch.tensor([2])},
            {"cache_policy": "modulo_k"},
        ):
            with pytest.raises(error, match=words):
                shared(ids, past_key_values=cache, **settings)


@pytest.mark.parametrize("name", ["linear_injection", "sliding_window", "sliding_core_with_global_tokens"])
@torch.no_grad()
def test_a_mixed_cache_continues_with_another_fixed_depth_exactly(name: str) -> None:
    """Turns of a conversation: adaptive, then fixed at two depths, then adaptive; each equals recomputation."""
    model = looped(**CONFIGURATIONS[name])
    ids, mask, depths = text(model, [12, 9])
    cache = CognexisCache(model.config)
    by_depths(model, ids[:, :5], mask[:, :5], depths[:, :5], past_key_values=cache, use_cache=True)
    for start, end, loops in ((5, 8, 3), (8, 9, LOOPS), (9, 11, 1)):
        depths[:, start:end] = loops
        depths *= mask
        seen = mask[:, :end]
        output = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, num_loops=loops)
        expected = recomputed(model, ids[:, :end], seen, depths[:, :end])[:, start:end]
        real = mask[:, start:end].bool()
        assert_same(output.logits[real], expected[real], LOOPS, f"turn at {start}")
    last = by_depths(model, ids[:, 11:], mask, depths[:, 11:], past_key_values=cache, use_cache=True)
    assert_same(last.logits, recomputed(model, ids, mask, depths)[:, 11:], LOOPS, "last turn")


@torch.no_grad()
def test_a_cropped_and_reordered_cache_equals_recomputation(shared: Any) -> None:
    ids, mask, depths = text(shared, [9, 7, 6])
    cache = CognexisCache(shared.config)
    by_depths(shared, ids, mask, depths, past_key_values=cache, use_cache=True)
    cache.crop(-3)
    rows = torch.tensor([2, 0, 0])
    cache.reorder_cache(rows)
    ids, mask, depths = ids[rows], mask[rows], depths[rows]
    changed = torch.cat((ids[:, :6], token_ids(shared, 3, 3, seed=5)), dim=1)
    output = by_depths(shared, changed[:, 6:], mask, depths[:, 6:], past_key_values=cache, use_cache=True)
    expected = recomputed(shared, changed, mask, depths)[:, 6:]
    assert_same(output.logits[mask[:, 6:].bool()], expected[mask[:, 6:].bool()], LOOPS)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, path",
    [
        ({"num_loops": 3}, "num_loops"),
        ({"num_loops": torch.tensor([3, 3])}, "num_loops"),
        ({"scheduler": "rules"}, "scheduler.type"),
        ({"scheduler": "value_head"}, "scheduler"),
        ({"scheduler": "hybrid"}, "scheduler"),
        ({"scheduler": "oracle"}, "scheduler"),
        ({"scheduler": OracleScheduler(torch.zeros(5, 2))}, "scheduler"),
        ({"scheduler": {"type": "rule_based", "min_delta": -1}}, "min_delta"),
        ({"cache_policy": "newest"}, "cache_policy"),
        ({"halt_dependency": "suffix"}, "halt_dependency"),
        ({"quality_tier": "best"}, "quality_tier"),
        ({"loop_mode": "adaptive_sequence", "halt_dependency": "prefix"}, "halt_dependency"),
        ({"halt_dependancy": "prefix"}, "halt_dependancy"),
        ({"schedulers": "fixed"}, "schedulers"),
        ({"max_loop": 3}, "max_loop"),
    ],
    ids=str,
)
def test_what_an_adaptive_forward_cannot_honour_is_refused(shared: Any, settings: dict[str, Any], path: str) -> None:
    ids, _, _ = text(shared, [4, 4])
    with pytest.raises(InvalidConfigError) as caught:
        shared(ids, **{"loop_mode": "adaptive_token"} | settings)
    assert str(caught.value.path).endswith(path)


def test_loops_by_row_need_one_number_for_each_row(shared: Any) -> None:
    ids, _, _ = text(shared, [4, 4])
    for loops in (torch.tensor([2, 2, 2]), torch.tensor([2])):
        with pytest.raises(ShapeMismatchError, match=r"num_loops: .*shape \(2,\), got"):
            shared(ids, num_loops=loops)


@pytest.mark.parametrize("settings", [{"loop_mode": "adaptive_sequence"}, {"loop_mode": "adaptive"}, {
    "loop_mode": "adaptive_token", "halt_dependency": "row"}], ids=str)  # fmt: skip
def test_row_rules_give_no_likelihood(settings: dict[str, Any]) -> None:
    model = looped()
    ids, _, _ = text(model, [6, 6])
    with pytest.raises(InvalidConfigError, match="labels: .*prefix"):
        model(ids, labels=ids, **settings)
    with pytest.raises(InvalidConfigError, match="labels: .*prefix"):
        model(ids, shift_labels=ids, **settings)
    model.train()
    with pytest.raises(InvalidConfigError, match="halt_dependency='row': .*training"):
        model(ids, **settings)


def test_recomputed_activations_and_mixed_depths_exclude_each_other() -> None:
    model = looped().train()
    ids, _, _ = text(model, [6, 6])
    model.gradient_checkpointing_enable()
    for settings in ({"loop_mode": "adaptive_token"}, {"num_loops": torch.tensor([2, 3])}):
        with pytest.raises(InvalidConfigError, match="gradient checkpointing"):
            model(ids, use_cache=False, **settings)
    model.eval()
    model(ids, loop_mode="adaptive_token")


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("linear_injection", "concat_project", "gate_condition", "attention_memory", "gate_with_loop_embedding"),
        *("learned_residual_scale", "sliding_core_with_global_tokens", "core_of_two_blocks", "untied_head"),
    ],
)
def test_gradients_of_token_halting_reach_every_parameter(name: str) -> None:
    model = looped(**CONFIGURATIONS[name]).train()
    ids, mask, depths = text(model)
    labels = ids.masked_fill(mask == 0, -100)
    output = model(
        ids, attention_mask=mask, labels=labels, use_cache=False, loop_mode="adaptive_token",
        halt_dependency="token", scheduler=ByTable(depths),
    )  # fmt: skip
    assert torch.isfinite(output.loss)
    assert torch.equal(output.loop_counts, depths)
    output.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


def test_the_gradient_is_that_of_the_definition() -> None:
    model = looped()
    ids, mask, depths = text(model)
    found = []
    for logits in (
        by_depths.__wrapped__(model, ids, mask, depths).logits,
        recomputed.__wrapped__(model, ids, mask, depths),
    ):
        loss = logits[mask.bool()].square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), grad, expected in zip(model.named_parameters(), *found, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("loop", [2, LOOPS])
def test_a_state_that_is_not_finite_is_an_error_in_training_and_a_reason_in_evaluation(loop: int) -> None:
    model = looped()
    ids, mask, _ = text(model, [6, 6])
    calls: list[int] = []

    def poison(module: Any, args: Any, state: Tensor) -> Tensor:
        calls.append(1)
        state = state.clone()
        if len(calls) == loop:
            state[0, 3] = torch.nan
        return state

    model.model.recurrent.loop_state.register_forward_hook(poison)
    scheduler = ByTable(torch.full((2, 6), LOOPS))
    output = adaptive(model, ids, mask, "adaptive_token", "token", scheduler=scheduler, return_loop_stats=True)
    assert output.halt_reasons[0][3] == "error" and output.loop_counts[0, 3] == loop
    assert output.halt_reasons[1] == ["max_loops"] * 6
    calls.clear()
    with pytest.raises(NonFiniteError, match=f"after loop {loop}"):
        model.train()(ids, loop_mode="adaptive_token", min_loops=LOOPS, use_cache=False)
