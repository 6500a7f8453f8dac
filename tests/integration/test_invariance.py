"""Nothing around a token changes its result, in every configuration, at every loop count, on every cache path."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

from cognexis import CognexisCache
from cognexis.decoder import masks as masks_module
from tests.batteries import invariance as battery
from tests.batteries.invariance import CACHES, CONFIGURATIONS, MAX_LOOPS
from tests.batteries.tiny import tiny_config, tiny_model

LOOPS = range(1, MAX_LOOPS + 1)


class Models:
    """One configuration's model in float32 and float64."""

    def __init__(self, overrides: dict[str, Any]) -> None:
        self.single = tiny_model(tiny_config(trained_max_loops=MAX_LOOPS, **overrides))
        self.double = copy.deepcopy(self.single).double()

    def runs(self, attention: str = "sdpa") -> list[tuple[Any, int]]:
        """Model and loop count: float64, where nothing but rounding can hide, at every count; float32 at the last."""
        for model in (self.single, self.double):
            model.set_attn_implementation(attention)
        return [*((self.double, loops) for loops in LOOPS), (self.single, MAX_LOOPS)]


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def models(request: pytest.FixtureRequest) -> Models:
    return Models(CONFIGURATIONS[request.param])


@pytest.fixture
def model() -> Any:
    return tiny_model(tiny_config(trained_max_loops=MAX_LOOPS))


# -- every configuration -------------------------------------------------------------------------------------------


def test_no_output_depends_on_a_later_token(models: Models) -> None:
    models.runs("eager")
    for loops in LOOPS:
        battery.check_causality(models.single, loops)
    for cache_kind in ("dynamic", "static"):
        battery.check_causality_of_cached_chunks(models.single, MAX_LOOPS, cache_kind)


def test_padding_on_either_side_changes_nothing(models: Models) -> None:
    for model, loops in models.runs():
        battery.check_padding(model, loops)


def test_neighbours_in_the_batch_change_nothing(models: Models) -> None:
    for model, loops in models.runs():
        battery.check_batch(model, loops)


@pytest.mark.parametrize("cache_kind", list(CACHES))
def test_decoding_token_by_token_equals_one_pass(models: Models, cache_kind: str) -> None:
    for model, loops in models.runs():
        if cache_kind in ("dynamic", "static"):
            battery.check_decoding(model, loops, cache_kind)
    if cache_kind not in ("dynamic", "static"):  # these differ from the others in the cache alone
        battery.check_decoding(models.double, MAX_LOOPS, cache_kind)


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_prefill_in_two_chunks_equals_one_pass_at_every_split(models: Models, cache_kind: str) -> None:
    models.runs()
    battery.check_chunks(models.double, MAX_LOOPS, cache_kind, [(n, 7 - n) for n in range(1, 7)])


def test_packed_documents_equal_separate_ones(models: Models) -> None:
    models.runs()
    battery.check_packing(models.double, MAX_LOOPS)
    for loops in range(1, MAX_LOOPS):  # the ways to say the boundaries end in the same masks
        battery.check_packing(models.double, loops, ["document_ids"])


def test_packed_documents_equal_separate_ones_in_training(models: Models) -> None:
    if models.double.config.recurrent_init == "random":
        pytest.skip("a random start draws fresh noise in training")
    models.runs()
    models.double.train()
    try:
        battery.check_packing(models.double, MAX_LOOPS)
    finally:
        models.double.eval()


def test_a_packed_document_never_sees_another(models: Models) -> None:
    models.runs("eager")
    for loops in LOOPS:
        battery.check_documents_are_apart(models.single, loops, battery.packings()["document_ids"])


def test_attention_backends_agree(models: Models) -> None:
    battery.check_backends(models.single, MAX_LOOPS)


@pytest.mark.slow
def test_every_path_holds_in_both_precisions_at_every_loop_count(models: Models) -> None:
    models.runs()
    for model in (models.single, models.double):
        for loops in LOOPS:
            battery.check_padding(model, loops)
            battery.check_batch(model, loops)
            battery.check_packing(model, loops)
            for cache_kind in CACHES:
                battery.check_decoding(model, loops, cache_kind)
                battery.check_chunks(model, loops, cache_kind, [(n, 9 - n) for n in range(1, 9)])
    for loops in LOOPS:
        battery.check_backends(models.single, loops)


# -- more of the plain configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_decoding_continues_prompts_of_every_length(seed: int) -> None:
    model = tiny_model(tiny_config(trained_max_loops=MAX_LOOPS), seed=seed)
    ids = battery.token_ids(model, 2, 18, seed=seed)
    mask = battery.left_padding([18, 13])
    for loops in LOOPS:
        for prompt in range(1, 17):
            seen = mask[:, : prompt + 2] if prompt > 5 else None  # before, the second row is padding only
            whole = battery.logits_of(model, ids[:, : prompt + 2], loops, attention_mask=seen)
            steps = battery.cached_logits(model, ids, loops, CognexisCache(model.config), [prompt, 1, 1], seen)
            real = torch.ones(2, prompt + 2).bool() if seen is None else seen.bool()
            battery.assert_same(steps[real], whole[real], loops, f"prompt of {prompt}")


def test_chunks_of_every_composition_equal_one_pass(model: Any) -> None:
    cuts = [[c for c in range(1, 6) if bits >> c & 1] for bits in range(0, 64, 2)]
    compositions = [[b - a for a, b in pairwise([0, *c, 6])] for c in cuts]
    assert len({tuple(c) for c in compositions}) == 32
    battery.check_chunks(model, MAX_LOOPS, "dynamic", compositions)


@pytest.mark.parametrize("name", ["document_ids", "seq_idx"])
def test_packed_rows_of_a_batch_hold_their_own_documents_and_padding(model: Any, name: str) -> None:
    model.double()
    ids = battery.token_ids(model, 2, 9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [4, 4, 7, 7, 7, 7, 7, -1, -1]])
    with torch.no_grad():
        packed = model(ids, num_loops=2, **{name: documents}).logits
    for row, start, end in ((0, 0, 3), (0, 3, 7), (0, 7, 9), (1, 0, 2), (1, 2, 7)):
        alone = battery.logits_of(model, ids[row : row + 1, start:end], 2)
        battery.assert_same(packed[row : row + 1, start:end], alone, 2, f"document {row}:{start}-{end}")


def test_an_attention_mask_marks_the_padding_of_packed_documents(model: Any) -> None:
    ids, documents = battery.token_ids(model, 1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        packed = model(ids, num_loops=2, document_ids=documents, attention_mask=mask).logits
        marked = model(ids, num_loops=2, document_ids=documents.masked_fill(mask == 0, -1)).logits
    assert torch.equal(packed[:, :6], marked[:, :6])
    battery.assert_same(packed[:, 3:6], battery.logits_of(model, ids[:, 3:6], 2), 2)


def test_an_all_ones_mask_does_not_hide_packed_documents(model: Any) -> None:
    ids, packing = battery.token_ids(model, 1, 11), battery.packings()["document_ids"]
    with torch.no_grad():
        with_mask = model(ids, attention_mask=torch.ones_like(ids), **packing).logits
        without = model(ids, **packing).logits
    assert torch.equal(with_mask, without)


def test_open_document_boundaries_make_one_sequence() -> None:
    model = tiny_model(tiny_config(document_boundary_attention=False))
    ids = battery.token_ids(model, 1, 11)
    plain = battery.logits_of(model, ids, 2)
    for name in ("document_ids", "seq_idx", "cu_seq_lens_q"):
        with torch.no_grad():
            assert torch.equal(model(ids, num_loops=2, **battery.packings()[name]).logits, plain)
    restarting = battery.packings()["restarting_positions"]
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 64
    with torch.no_grad():
        a, b = (model(x, num_loops=2, **restarting).logits for x in (ids, changed))
    assert not torch.equal(a[:, 4:], b[:, 4:]), "the first document must be visible to the later ones"


def test_more_loops_change_the_result(model: Any) -> None:
    results = [battery.logits_of(model, battery.token_ids(model, 1, 6), loops) for loops in LOOPS]
    for shallow, deep in pairwise(results):
        assert (shallow - deep).abs().max() > 0.05


# -- the checks can fail -------------------------------------------------------------------------------------------


def test_reading_the_slot_of_another_loop_is_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, cache = battery.token_ids(model, 1, 8), CognexisCache(model.config)
    whole = battery.logits_of(model, ids, 2)
    battery.assert_same(battery.cached_logits(model, ids, 2, cache, [6]), whole[:, :6], 2)
    first, second = model.model.recurrent.blocks[0].attention.sites[:2]
    slots = first.layer_idx, second.layer_idx
    monkeypatch.setattr(first, "layer_idx", slots[1])
    monkeypatch.setattr(second, "layer_idx", slots[0])
    with pytest.raises(AssertionError, match="differs by"):
        battery.assert_same(battery.cached_logits(model, ids, 2, cache, [1, 1]), whole[:, 6:], 2)


def test_sharing_one_slot_between_loops_is_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop 2 reads the keys of loop 1, as a cache of the first loop only would have it."""
    ids, cache = battery.token_ids(model, 1, 8), CognexisCache(model.config)
    whole = battery.logits_of(model, ids, 2)
    battery.cached_logits(model, ids, 2, cache, [6])
    first, second = (s.layer_idx for s in model.model.recurrent.blocks[0].attention.sites[:2])
    cache.layers[second] = copy.deepcopy(cache.layers[first])
    with pytest.raises(AssertionError, match="differs by"):
        battery.assert_same(battery.cached_logits(model, ids, 2, cache, [1, 1]), whole[:, 6:], 2)


@pytest.mark.parametrize("check", [battery.check_causality, battery.check_padding, battery.check_batch])
def test_a_missing_mask_is_noticed(model: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set_attn_implementation("eager")
    check(model, 2)
    monkeypatch.setattr(masks_module, "create_causal_mask", lambda **_: None)  # eager then shows every key
    with pytest.raises(AssertionError):
        check(model, 2)


def test_an_open_boundary_is_noticed() -> None:
    model = tiny_model(tiny_config(document_boundary_attention=False))
    with pytest.raises(AssertionError):
        battery.check_packing(model, 2)
