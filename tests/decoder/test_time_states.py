"""Layers with memory over time: one result by every way, in every stage, at one depth and at mixed depths."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cognexis import CognexisCache
from cognexis.decoder.inputs import default_positions, time_resets
from cognexis.decoder.masks import build_masks
from tests.batteries.invariance import (
    MAX_LOOPS,
    assert_same,
    check_batch,
    check_causality,
    check_causality_of_cached_chunks,
    check_chunks,
    check_decoding,
    check_documents_are_apart,
    check_packing,
    check_padding,
    left_padding,
    packings,
    token_ids,
)
from tests.batteries.scripted_schedulers import ByTable
from tests.batteries.state_layers import CELLS, MIXTURES, STAGES, overrides
from tests.batteries.tiny import tiny_config, tiny_model

DEPTHS = 4
IN_THE_CORE = {cell: overrides(cell, "core") for cell in CELLS}
QUICK = {
    "axon",
    "lstm",
    "conv",
    "mlstm",
    "slstm",
    "xl",
    "agalite",
    "no_attention_anywhere",
    "core_of_attention_and_memory",
}
ELSEWHERE = {f"{cell}_in_{stage}": overrides(cell, stage) for cell in CELLS for stage in STAGES if stage != "core"}
EVERY = {**IN_THE_CORE, **MIXTURES, **ELSEWHERE}
CASES = [
    pytest.param(settings, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for name, settings in EVERY.items()
]


def model_of(settings: dict[str, Any]) -> Any:
    return tiny_model(tiny_config(trained_max_loops=DEPTHS, **settings)).double()


@pytest.mark.parametrize("settings", CASES)
def test_what_must_not_change_a_result_does_not(settings: dict[str, Any]) -> None:
    model = model_of(settings)
    check_causality(model, MAX_LOOPS)
    check_padding(model, MAX_LOOPS, bitwise=False)
    check_batch(model, MAX_LOOPS)
    check_packing(model, MAX_LOOPS)
    check_documents_are_apart(model, MAX_LOOPS, packings()["document_ids"], bitwise=False)


@pytest.mark.parametrize("settings", CASES)
def test_a_cache_gives_what_one_pass_gives(settings: dict[str, Any]) -> None:
    model = model_of(settings)
    for kind in ("dynamic", "static_with_room_to_spare"):
        for loops in (1, MAX_LOOPS):
            check_decoding(model, loops, kind)
        check_chunks(model, MAX_LOOPS, kind, [(9,), (1,) * 9, (4, 5), (8, 1), (2, 3, 4)])
    check_causality_of_cached_chunks(model, MAX_LOOPS, "dynamic")


# -- mixed depths ----------------------------------------------------------------------------------------------------

LENGTHS, CHUNKS = [9, 7, 4], [4, 1, 3, 1]


def text(model: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, left-padded mask and random depths of the real tokens, 0 at padding."""
    mask = left_padding(LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    depths = torch.randint(1, DEPTHS + 1, mask.shape, generator=generator) * mask
    return token_ids(model, *mask.shape, seed=seed), mask, depths


@torch.no_grad()
def recomputed(model: Any, ids: Tensor, mask: Tensor, depths: Tensor) -> Tensor:
    """Logits by the definition: all tokens in every loop, and a token keeps its state after its own depth."""
    body = model.model
    hidden = body.embed_tokens(ids)
    positions = default_positions(mask, None, None, ids.shape[1], ids.device)
    around = {"position_embeddings": body.rotary_emb(hidden, position_ids=positions), "position_ids": positions}
    around["resets"] = time_resets(mask, None, hidden)
    masks = build_masks(model.config, hidden, mask, None, positions, None)
    h0 = body.prelude(hidden, masks=masks, past_key_values=None, **around)
    state, memories = h0, [None] * len(body.recurrent.blocks)
    for index in range(int(depths.max())):
        update, _ = body.recurrent.loop(state, h0, index, masks, memories, **around)
        state = torch.where((index < depths)[..., None], update, state)
    return model.lm_head(body.final_norm(body.coda(state, masks=masks, past_key_values=None, **around)))


@torch.no_grad()
def by_depths(model: Any, ids: Tensor, mask: Tensor, scheduler: ByTable, compaction: str, **kwargs: Any) -> Any:
    model.model.compaction = compaction
    settings = {"loop_mode": "adaptive_token", "halt_dependency": "token", "scheduler": scheduler}
    return model(ids, attention_mask=mask, **settings, **kwargs)


def in_chunks(model: Any, ids: Tensor, mask: Tensor, depths: Tensor, cache: Any, compaction: str) -> Tensor:
    scheduler, start, pieces = ByTable(depths), 0, []
    for size in CHUNKS:
        end = start + size
        output = by_depths(
            model, ids[:, start:end], mask[:, :end], scheduler, compaction, past_key_values=cache, use_cache=True
        )
        assert torch.equal(output.loop_counts, depths[:, start:end])
        pieces.append(output.logits)
        start = end
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("settings", CASES)
def test_every_way_of_computing_mixed_depths_gives_the_definition(settings: dict[str, Any]) -> None:
    model = model_of(settings)
    ids, mask, depths = text(model)
    real = mask.bool()
    expected = recomputed(model, ids, mask, depths)[real]
    for compaction in ("off", "exact"):
        output = by_depths(model, ids, mask, ByTable(depths), compaction, use_cache=False)
        assert torch.equal(output.loop_counts, depths)
        assert_same(output.logits[real], expected, DEPTHS, f"compaction {compaction}")
        cached = in_chunks(model, ids, mask, depths, CognexisCache(model.config), compaction)
        assert_same(cached[real], expected, DEPTHS, f"cache, compaction {compaction}")
