"""The slotted cache: who owns which slot, what it costs, how it shrinks and grows, and the misuse it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from transformers import DynamicCache, StaticCache

from cognexis import CognexisCache
from cognexis.decoder.cache import CacheSlot, slot_table
from cognexis.errors import CacheError, InvalidConfigError
from tests.batteries.invariance import assert_same, cached_logits, left_padding, logits_of, token_ids
from tests.batteries.tiny import tiny_config, tiny_model

SLIDING = {"sliding_window": 4, "prelude_layer_types": ["full_attention", "sliding_attention"]}


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def ids(model: Any) -> Tensor:
    return token_ids(model, 2, 8)


def lengths(cache: Any) -> list[int]:
    return [int(cache.get_seq_length(slot)) for slot in range(len(cache.layers))]


def filled(model: Any, ids: Tensor, loops: int = 2, cache: Any = None) -> Any:
    """A cache that holds ``ids``."""
    cache = CognexisCache(model.config) if cache is None else cache
    cached_logits(model, ids, loops, cache, [ids.shape[1]])
    return cache


def keys(rows: int = 2, heads: int = 2, tokens: int = 1, width: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, heads, tokens, width).to(dtype)


# -- slots and bytes -----------------------------------------------------------------------------------------------


def test_slots_are_prelude_then_coda_then_loop_by_loop() -> None:
    config = tiny_config(num_recurrent_blocks=2, experimental_multi_block=True, trained_max_loops=2)
    assert slot_table(config) == [
        CacheSlot("prelude", 0),
        CacheSlot("prelude", 1),
        CacheSlot("coda", 0),
        CacheSlot("recurrent", 0, 1),
        CacheSlot("recurrent", 1, 1),
        CacheSlot("recurrent", 0, 2),
        CacheSlot("recurrent", 1, 2),
    ]


def test_attention_memory_has_a_slot_of_its_own_before_the_loops() -> None:
    config = tiny_config(input_injection="attention_memory", trained_max_loops=2)
    assert slot_table(config)[3:] == [
        CacheSlot("recurrent", 0),
        CacheSlot("recurrent", 0, 1),
        CacheSlot("recurrent", 0, 2),
    ]


def test_every_attention_site_writes_to_the_slot_of_its_stage_block_and_loop(model: Any) -> None:
    table = slot_table(model.config)
    stages = {"prelude": model.model.prelude, "recurrent": model.model.recurrent, "coda": model.model.coda}
    owners = {}
    for stage, module in stages.items():
        for block, one in enumerate(module.blocks):
            for loop, site in enumerate(one.attention.sites, start=1):
                owners[site.layer_idx] = CacheSlot(stage, block, loop if stage == "recurrent" else None)
    assert [owners[slot] for slot in range(len(table))] == table
    assert len(table) == model.config.num_hidden_layers == len(CognexisCache(model.config))


def test_prefill_writes_every_token_to_each_slot_in_use_and_none_to_the_others(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids[:, :3], loops=2)
    held = dict(zip(cache.slots, lengths(cache), strict=True))
    assert {slot: n for slot, n in held.items() if n} == {
        CacheSlot("prelude", 0): 3,
        CacheSlot("prelude", 1): 3,
        CacheSlot("coda", 0): 3,
        CacheSlot("recurrent", 0, 1): 3,
        CacheSlot("recurrent", 0, 2): 3,
    }


def test_decoding_runs_the_stages_on_the_new_token_only(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids[:, :3])
    seen = []
    for block in (model.model.prelude.blocks[0], model.model.recurrent.blocks[0], model.model.coda.blocks[0]):
        block.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    cached_logits(model, ids, 2, cache, [1])
    assert seen == [(2, 1, 32)] * 4  # prelude, two loops, coda
    assert set(lengths(cache)) == {4, 0}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("loops", [1, 4])
def test_bytes_are_those_of_the_key_value_heads_of_the_slots_in_use(kv_heads: int, loops: int) -> None:
    model = tiny_model(tiny_config(num_key_value_heads=kv_heads))
    cache = filled(model, token_ids(model, 2, 5), loops)
    slots = 2 + 1 + loops
    assert cache.memory_bytes() == 2 * slots * 2 * kv_heads * 5 * 8 * 4
    assert cache.layers[0].keys.shape == (2, kv_heads, 5, 8)


def test_an_empty_cache_takes_no_bytes(model: Any) -> None:
    assert CognexisCache(model.config).memory_bytes() == 0


def test_keys_of_the_loops_differ(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids, loops=4)
    loop_keys = [cache.layers[slot].keys for slot in range(3, 7)]
    for i, a in enumerate(loop_keys):
        for b in loop_keys[i + 1 :]:
            assert (a - b).abs().max() > 1e-3


# -- one loop count per cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1), (2, 4)])
def test_another_loop_count_on_a_filled_cache_is_refused(model: Any, ids: Tensor, first: int, second: int) -> None:
    cache = filled(model, ids[:, :4], first)
    before = lengths(cache)
    with pytest.raises(CacheError, match=rf"{first} loops.*num_loops={second}"):
        model(ids[:, 4:5], past_key_values=cache, num_loops=second)
    assert lengths(cache) == before
    expected = logits_of(model, ids, first)
    assert_same(cached_logits(model, ids, first, cache, [4]), expected[:, 4:], first, "after the refusal")


def test_a_reset_cache_serves_another_loop_count(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids, 4)
    cache.reset()
    cache.reset()
    assert (cache.num_loops, cache.memory_bytes(), set(lengths(cache))) == (None, 0, {0})
    assert_same(cached_logits(model, ids, 2, cache, [5, 3]), logits_of(model, ids, 2), 2, "after a reset")


def test_a_reset_static_cache_serves_another_loop_count(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids, 4, CognexisCache(model.config, "static", max_cache_len=8))
    cache.reset()
    assert set(lengths(cache)) == {0}
    assert_same(cached_logits(model, ids, 2, cache, [5, 3]), logits_of(model, ids, 2), 2, "after a reset")


@pytest.mark.parametrize("overrides", [{}, SLIDING])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_released_cache_holds_nothing(overrides: dict[str, Any], kind: str) -> None:
    model = tiny_model(tiny_config(**overrides))
    cache = filled(model, token_ids(model, 2, 6), 2, CognexisCache(model.config, kind, max_cache_len=8))
    assert cache.memory_bytes() > 0
    cache.release()
    cache.release()
    assert cache.memory_bytes() == 0
    assert set(lengths(cache)) == {0}


@pytest.mark.parametrize("overrides", [{}, SLIDING])
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda model, ids, cache: model(ids, past_key_values=cache, num_loops=2), id="forward"),
        pytest.param(
            lambda model, ids, cache: model.generate(ids, past_key_values=cache, max_new_tokens=1), id="generate"
        ),
        pytest.param(lambda model, ids, cache: cache.update(keys(), keys(), 0), id="update"),
        pytest.param(lambda model, ids, cache: cache.crop(-1), id="crop"),
        pytest.param(lambda model, ids, cache: cache.reset(), id="reset"),
        pytest.param(lambda model, ids, cache: cache.reorder_cache(torch.tensor([1, 0])), id="reorder"),
        pytest.param(lambda model, ids, cache: cache.batch_repeat_interleave(2), id="repeat"),
        pytest.param(lambda model, ids, cache: cache.batch_select_indices(torch.tensor([0])), id="select"),
    ],
)
def test_a_released_cache_refuses_every_use(overrides: dict[str, Any], use: Callable[..., Any]) -> None:
    model = tiny_model(tiny_config(**overrides))
    ids = token_ids(model, 2, 6)
    cache = filled(model, ids)
    cache.release()
    with pytest.raises(CacheError):
        use(model, ids, cache)


# -- capacity ------------------------------------------------------------------------------------------------------


def test_a_static_cache_of_one_token_refuses_the_second(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids[:, :1], 2, CognexisCache(model.config, "static", max_cache_len=1))
    with pytest.raises(CacheError, match="max_cache_len=1"):
        model(ids[:, 1:2], past_key_values=cache, num_loops=2)


@pytest.mark.parametrize("slot", range(7))
def test_every_slot_of_a_static_cache_refuses_the_second_append(model: Any, slot: int) -> None:
    cache = CognexisCache(model.config, "static", max_cache_len=1)
    cache.update(keys(), keys(), slot)
    with pytest.raises(CacheError, match="max_cache_len=1"):
        cache.update(keys(), keys(), slot)


@pytest.mark.parametrize("capacity, fits", [(3, True), (2, False)])
def test_a_prompt_must_fit_a_static_cache(model: Any, ids: Tensor, capacity: int, fits: bool) -> None:
    cache = CognexisCache(model.config, "static", max_cache_len=capacity)
    if fits:
        assert set(lengths(filled(model, ids[:, :3], 2, cache))) == {3, 0}
        return
    with pytest.raises(CacheError, match="max_cache_len=2"):
        model(ids[:, :3], past_key_values=cache, num_loops=2)


@pytest.mark.parametrize("overrides", [{}, {**SLIDING, "prelude_layer_types": ["sliding_attention"] * 2}])
def test_a_refused_append_leaves_a_static_cache_as_it_was(overrides: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(**overrides))
    ids = token_ids(model, 1, 8)
    cache = filled(model, ids[:, :5], 2, CognexisCache(model.config, "static", max_cache_len=6))
    before = lengths(cache)
    with pytest.raises(CacheError):
        model(ids[:, 5:8], past_key_values=cache, num_loops=2)
    assert lengths(cache) == before
    steps = cached_logits(model, ids, 2, cache, [1])
    assert_same(steps, logits_of(model, ids[:, :6], 2)[:, 5:], 2, "after the refusal")


@pytest.mark.parametrize("length", [0, -1, None, 2.5, "8"])
def test_a_static_cache_needs_a_length(model: Any, length: Any) -> None:
    with pytest.raises(InvalidConfigError, match="max_cache_len") as caught:
        CognexisCache(model.config, "static", max_cache_len=length)
    assert caught.value.path == "max_cache_len"


def test_an_unknown_cache_type_is_refused(model: Any) -> None:
    with pytest.raises(InvalidConfigError, match="dynamic or static") as caught:
        CognexisCache(model.config, "paged")
    assert caught.value.path == "cache_type"


# -- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "other, name",
    [
        ({"rows": 3}, "batch size 2, the new keys have 3"),
        ({"heads": 4}, "number of key/value heads 2, the new keys have 4"),
        ({"width": 16}, "head width 8, the new keys have 16"),
        ({"dtype": torch.float64}, "dtype torch.float32, the new keys have torch.float64"),
    ],
)
def test_keys_of_another_shape_or_dtype_are_refused(model: Any, kind: str, other: dict[str, Any], name: str) -> None:
    cache = CognexisCache(model.config, kind, max_cache_len=8)
    cache.update(keys(), keys(), 4)
    with pytest.raises(CacheError, match=f"slot 4 holds {name}"):
        cache.update(keys(**other), keys(**other), 4)


def test_keys_on_another_device_are_refused(model: Any) -> None:
    cache = CognexisCache(model.config)
    cache.update(keys(), keys(), 0)
    with pytest.raises(CacheError, match="device cpu, the new keys have meta"):
        cache.update(keys().to("meta"), keys().to("meta"), 0)


def test_a_slot_beyond_the_last_is_refused(model: Any) -> None:
    with pytest.raises(CacheError, match="slot 7 does not exist, the cache has 7"):
        CognexisCache(model.config).update(keys(), keys(), 7)


def test_a_cache_of_another_batch_is_refused(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids)
    with pytest.raises(CacheError, match="batch size"):
        model(ids[:1, :1], past_key_values=cache, num_loops=2)


def test_a_cache_of_another_dtype_is_refused(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids)
    with pytest.raises(CacheError, match="dtype"):
        model.double()(ids[:, :1], past_key_values=cache, num_loops=2)


@pytest.mark.parametrize("is_filled", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        {"num_prelude_blocks": 1, "num_coda_blocks": 2},  # as many slots, other owners
        {"num_prelude_blocks": 1},
        {"num_coda_blocks": 2},
        {"num_recurrent_blocks": 2, "experimental_multi_block": True},
        SLIDING,
    ],
)
def test_a_cache_of_another_architecture_is_refused(
    model: Any, ids: Tensor, overrides: dict[str, Any], is_filled: bool
) -> None:
    other = tiny_model(tiny_config(**overrides))
    cache = filled(other, ids[:, :4]) if is_filled else CognexisCache(other.config)
    with pytest.raises(CacheError, match="past_key_values"):
        model(ids[:, 4:], past_key_values=cache, num_loops=2)


@pytest.mark.parametrize("cache", ["cache", ((keys(), keys()),) * 7], ids=["text", "legacy_tuple"])
def test_what_is_not_a_cache_is_refused(model: Any, ids: Tensor, cache: Any) -> None:
    with pytest.raises(CacheError, match="past_key_values"):
        model(ids, past_key_values=cache, num_loops=2)


# -- shrinking and reordering --------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, 3, 5])
def test_a_cropped_cache_continues_as_if_the_tokens_had_never_been(model: Any, ids: Tensor, removed: int) -> None:
    wrong = ids.clone()
    wrong[:, 5 - removed : 5] = (ids[:, 5 - removed : 5] + 1) % 64
    cache = filled(model, wrong[:, :5])
    cache.crop(-removed)
    assert set(lengths(cache)) == {5 - removed, 0}
    steps = cached_logits(model, ids, 2, cache, [removed, 1, 2])
    assert_same(steps, logits_of(model, ids, 2)[:, 5 - removed :], 2, "after a crop")


@pytest.mark.parametrize("tokens", [1, 5, -6, -100])
def test_a_crop_of_tokens_that_are_not_there_is_refused(model: Any, ids: Tensor, tokens: int) -> None:
    cache = filled(model, ids[:, :5])
    with pytest.raises(CacheError, match=rf"tokens_to_remove={tokens}: must lie between -5"):
        cache.crop(tokens)
    assert set(lengths(cache)) == {5, 0}


def test_a_crop_of_nothing_changes_nothing(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids[:, :5])
    before = cache.layers[3].keys.clone()
    cache.crop(0)
    assert torch.equal(cache.layers[3].keys, before)
    CognexisCache(model.config).crop(0)


def test_a_recording_sliding_cache_can_be_cropped_past_its_window() -> None:
    model = tiny_model(tiny_config(**SLIDING))
    ids = token_ids(model, 1, 9)
    cache = CognexisCache(model.config)
    cache.activate_past_recording()
    cached_logits(model, ids, 2, cache, [7])
    cache.crop(-2)
    assert set(lengths(cache)) == {5, 0}
    assert_same(cached_logits(model, ids, 2, cache, [4]), logits_of(model, ids, 2)[:, 5:], 2, "after a crop")


@pytest.mark.parametrize("from_mixed", [False, True])
def test_slots_that_are_laid_out_later_record_too(from_mixed: bool) -> None:
    model = tiny_model(tiny_config(**SLIDING))
    ids = token_ids(model, 1, 9)
    cache = CognexisCache(model.config, mixed_depth=from_mixed)
    cache.activate_past_recording()
    loops: Any = model.config.max_loops + 1 if from_mixed else torch.tensor([2])  # the other layout, and a slot more
    model(ids[:, :7], num_loops=loops, past_key_values=cache, allow_extrapolation=True)
    cache.crop(-2)
    found = model(ids[:, 5:], num_loops=loops, past_key_values=cache, allow_extrapolation=True).logits
    assert_same(found, model(ids, num_loops=loops, allow_extrapolation=True).logits[:, 5:], 2, "after a crop")


def test_a_sliding_cache_that_dropped_its_past_refuses_a_crop_and_stays_usable() -> None:
    model = tiny_model(tiny_config(**SLIDING))
    ids = token_ids(model, 1, 9)
    cache = filled(model, ids[:, :7])
    with pytest.raises(CacheError):
        cache.crop(-2)
    assert set(lengths(cache)) == {7, 0}
    assert_same(cached_logits(model, ids, 2, cache, [2]), logits_of(model, ids, 2)[:, 7:], 2, "after the refusal")


def test_a_static_cache_refuses_a_crop(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids[:, :5], 2, CognexisCache(model.config, "static", max_cache_len=8))
    with pytest.raises(CacheError):
        cache.crop(-1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("overrides", [{}, SLIDING, {"input_injection": "attention_memory"}])
def test_reordering_moves_every_slot_of_a_row_together(overrides: dict[str, Any], kind: str) -> None:
    model = tiny_model(tiny_config(**overrides))
    ids = token_ids(model, 3, 9)
    beams = torch.tensor([2, 0, 0])
    cache = filled(model, ids[:, :6], 2, CognexisCache(model.config, kind, max_cache_len=9))
    cache.reorder_cache(beams)
    steps = cached_logits(model, ids[beams], 2, cache, [1, 2])
    assert_same(steps, logits_of(model, ids[beams], 2)[:, 6:], 2, "after reordering")


def test_selected_and_repeated_rows_continue_alone(model: Any, ids: Tensor) -> None:
    chosen = filled(model, ids[:, :5])
    chosen.batch_select_indices(torch.tensor([1]))
    assert_same(cached_logits(model, ids[1:], 2, chosen, [3]), logits_of(model, ids[1:], 2)[:, 5:], 2, "selected")
    repeated = filled(model, ids[:, :5])
    repeated.batch_repeat_interleave(3)
    rows = ids.repeat_interleave(3, dim=0)
    assert_same(cached_logits(model, rows, 2, repeated, [1, 2]), logits_of(model, rows, 2)[:, 5:], 2, "repeated")


def test_a_copy_is_equal_and_apart(model: Any, ids: Tensor) -> None:
    """A prefix that two requests share must not let one write where the other reads."""
    cache = filled(model, ids[:, :5])
    before = [layer.keys.clone() for layer in cache.layers[:5]]
    twin = copy.deepcopy(cache)
    other = (ids + 1) % 64
    cached_logits(model, torch.cat((ids[:, :5], other), 1), 2, twin, [3])
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers[:5], before, strict=True))
    assert_same(cached_logits(model, ids, 2, cache, [3]), logits_of(model, ids, 2)[:, 5:], 2, "beside its copy")


# -- more loops than slots -----------------------------------------------------------------------------------------


def test_a_dynamic_cache_grows_with_allowed_extrapolation(model: Any, ids: Tensor) -> None:
    names, slots = set(model.state_dict()), model.config.num_hidden_layers
    cache = CognexisCache(model.config)
    with torch.no_grad():
        whole = model(ids, num_loops=6, allow_extrapolation=True, use_cache=False).logits
        steps = [
            model(x, num_loops=6, allow_extrapolation=True, past_key_values=cache).logits
            for x in ids.split((5, 1, 2), dim=1)
        ]
    assert_same(torch.cat(steps, dim=1), whole, 6, "beyond the slots")
    assert cache.slots[-1] == CacheSlot("recurrent", 0, 6)
    assert lengths(cache) == [8] * 9
    assert (set(model.state_dict()), model.config.num_hidden_layers) == (names, slots)


@pytest.mark.parametrize("kinds", [["sliding_attention"], ["sliding_attention", "full_attention"]])
def test_a_grown_cache_keeps_the_layer_types_of_the_core(kinds: list[str]) -> None:
    several = {"num_recurrent_blocks": len(kinds), "experimental_multi_block": True}
    model = tiny_model(tiny_config(**several, sliding_window=4, core_layer_types=kinds, kv_slots=1))
    ids = token_ids(model, 1, 8)
    cache = CognexisCache(model.config)
    assert_same(cached_logits(model, ids, 3, cache, [6, 1, 1]), logits_of(model, ids, 3), 3, "grown cache")
    assert cache.is_sliding == [False] * 3 + [kind == "sliding_attention" for kind in kinds] * 3


def test_fewer_slots_than_loops_still_decode_exactly(ids: Tensor) -> None:
    model = tiny_model(tiny_config(kv_slots=2))
    assert model.config.num_hidden_layers == 5
    cache = CognexisCache(model.config)
    assert_same(cached_logits(model, ids, 4, cache, [5, 1, 2]), logits_of(model, ids, 4), 4, "two slots, four loops")


def test_a_static_cache_does_not_grow(ids: Tensor) -> None:
    model = tiny_model(tiny_config(kv_slots=2))
    cache = CognexisCache(model.config, "static", max_cache_len=8)
    with pytest.raises(CacheError, match="kv_slots=2 loops cannot hold num_loops=3"):
        model(ids, past_key_values=cache, num_loops=3)


# -- stock caches --------------------------------------------------------------------------------------------------


def test_stock_caches_with_enough_slots_decode_exactly(model: Any, ids: Tensor) -> None:
    whole = logits_of(model, ids, 2)
    for cache in (
        DynamicCache(config=model.config),
        DynamicCache(),
        StaticCache(config=model.config, max_cache_len=8),
    ):
        assert_same(cached_logits(model, ids, 2, cache, [5, 1, 2]), whole, 2, type(cache).__name__)


def test_a_stock_cache_with_too_few_slots_is_refused(model: Any, ids: Tensor) -> None:
    cache = DynamicCache(config=tiny_config(kv_slots=1))
    with pytest.raises(CacheError, match="has 4 slots, num_loops=2 needs 5"):
        model(ids, past_key_values=cache, num_loops=2)


@pytest.mark.parametrize("make", [lambda config: DynamicCache(config=config), lambda config: DynamicCache()])
@pytest.mark.parametrize("first, second", [(1, 2), (2, 1), (4, 2)])
def test_a_stock_cache_filled_at_another_loop_count_is_refused(
    model: Any, ids: Tensor, make: Callable[[Any], Any], first: int, second: int
) -> None:
    cache = make(model.config)
    cached_logits(model, ids, first, cache, [4])
    with pytest.raises(CacheError, match=f"another number of loops than num_loops={second}"):
        model(ids[:, 4:5], past_key_values=cache, num_loops=second)


def test_a_stock_static_cache_filled_at_another_loop_count_is_refused(model: Any, ids: Tensor) -> None:
    cache = StaticCache(config=model.config, max_cache_len=8)
    cached_logits(model, ids, 1, cache, [4])
    with pytest.raises(CacheError, match="another number of loops than num_loops=2"):
        model(ids[:, 4:5], past_key_values=cache, num_loops=2)


# -- a cache through generate --------------------------------------------------------------------------------------


def greedy(model: Any, ids: Tensor, new_tokens: int, **kwargs: Any) -> Any:
    model.generation_config.eos_token_id = None
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, num_loops=2, **kwargs)


def test_a_second_turn_continues_the_cache_of_the_first(model: Any, ids: Tensor) -> None:
    cache = CognexisCache(model.config)
    first = greedy(model, ids, 4, past_key_values=cache)
    assert set(lengths(cache)) == {ids.shape[1] + 3, 0}
    prompt = torch.cat((first, ids[:, :3]), dim=1)
    seen = []
    model.model.prelude.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    second = greedy(model, prompt, 4, past_key_values=cache)
    assert seen == [4, 1, 1, 1]  # the last token of the first turn and the three new ones, then one by one
    assert torch.equal(second, greedy(model, prompt, 4))


def test_a_second_turn_with_padding_continues_the_cache(model: Any, ids: Tensor) -> None:
    mask = left_padding([8, 5])
    cache = CognexisCache(model.config)
    first = greedy(model, ids, 4, past_key_values=cache, attention_mask=mask)
    prompt = torch.cat((first, ids[:, :3]), dim=1)
    longer = torch.cat((mask, torch.ones(2, 7, dtype=torch.long)), dim=1)
    second = greedy(model, prompt, 4, past_key_values=cache, attention_mask=longer)
    assert torch.equal(second, greedy(model, prompt, 4, attention_mask=longer))


def test_generate_refuses_a_cache_of_another_loop_count(model: Any, ids: Tensor) -> None:
    with pytest.raises(CacheError, match="holds keys of 3 loops"):
        greedy(model, ids, 2, past_key_values=filled(model, ids[:, :5], 3))


def test_generate_returns_the_cache_it_used(model: Any, ids: Tensor) -> None:
    output = greedy(model, ids, 3, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, CognexisCache)
    assert (output.past_key_values.num_loops, set(lengths(output.past_key_values))) == (2, {10, 0})


def test_a_cache_that_reached_the_last_position_refuses_another_token() -> None:
    model = tiny_model(tiny_config(max_position_embeddings=8))
    ids = token_ids(model, 1, 9)
    cache = filled(model, ids[:, :8])
    with pytest.raises(InvalidConfigError, match="position 8 is beyond max_position_embeddings=8"):
        model(ids[:, 8:], past_key_values=cache, num_loops=2)
    assert set(lengths(cache)) == {8, 0}


def test_a_mask_with_a_gap_or_an_overlap_to_the_cache_is_refused(model: Any, ids: Tensor) -> None:
    cache = filled(model, ids[:, :5])
    for length in (1, 5, 7):
        with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 6\]"):
            model(ids[:, 5:6], attention_mask=torch.ones(2, length), past_key_values=cache, num_loops=2)
    assert set(lengths(cache)) == {5, 0}


def test_gradients_flow_through_a_cached_prefill(model: Any, ids: Tensor) -> None:
    parameter = model.model.recurrent.blocks[0].attention.k_proj.weight
    gradients = []
    for use_cache in (False, True):
        model.zero_grad()
        model(ids, labels=ids, num_loops=3, use_cache=use_cache).loss.backward()
        gradients.append(parameter.grad.clone())
    assert gradients[0].abs().max() > 1e-4
    assert torch.equal(*gradients)


# -- any sequence of operations ------------------------------------------------------------------------------------

_MACHINE_MODEL = tiny_model(tiny_config(max_position_embeddings=512))


class CacheMachine(RuleBasedStateMachine):
    """Adds, crops, reorders, copies and resets; after each, the cache must give what a fresh computation gives."""

    @initialize(loops=st.sampled_from([1, 3]), rows=st.integers(1, 3))
    def start(self, loops: int, rows: int) -> None:
        self.loops, self.rows = loops, rows
        self.cache = CognexisCache(_MACHINE_MODEL.config)
        self.ids = torch.zeros(rows, 0, dtype=torch.long)

    @rule(tokens=st.lists(st.integers(3, 63), min_size=1, max_size=4))
    def add(self, tokens: list[int]) -> None:
        new = (torch.tensor(tokens) + 7 * torch.arange(self.rows)[:, None]) % 61 + 3
        self.ids = torch.cat((self.ids, new), dim=1)
        steps = cached_logits(_MACHINE_MODEL, self.ids, self.loops, self.cache, [len(tokens)])
        whole = logits_of(_MACHINE_MODEL, self.ids, self.loops)
        assert_same(steps, whole[:, -len(tokens) :], self.loops, "cache after any history")

    @precondition(lambda self: self.ids.shape[1] > 0)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        kept = data.draw(st.integers(0, self.ids.shape[1]))
        self.cache.crop(kept - self.ids.shape[1])
        self.ids = self.ids[:, :kept]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = st.integers(0, self.rows - 1)
        order = torch.tensor(data.draw(st.lists(rows, min_size=self.rows, max_size=self.rows)))
        self.cache.reorder_cache(order)
        self.ids = self.ids[order]

    @rule()
    def copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    @rule(loops=st.sampled_from([1, 3]))
    def reset(self, loops: int) -> None:
        self.cache.reset()
        self.loops, self.ids = loops, self.ids[:, :0]

    @invariant()
    def slots_in_use_hold_every_token(self) -> None:
        held = lengths(self.cache)
        assert held[: 3 + self.loops] == [self.ids.shape[1]] * (3 + self.loops)
        assert not any(held[3 + self.loops :])


CacheMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=8, derandomize=True, deadline=None)
TestAnyHistory = CacheMachine.TestCase
