"""Documents, positions and masks: every source, and brute-force masks cell by cell."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cognexis.decoder.masks import build_masks, document_positions, find_documents
from cognexis.errors import InvalidConfigError, ShapeMismatchError
from tests.batteries.tiny import tiny_config, tiny_model

SLIDING = {"core_layer_types": ["sliding_attention"], "sliding_window": 3}


def seen_positions(model: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The positions that the rotary embedding gets in each call of a forward."""
    seen: list[Tensor] = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda _, inputs, kw: seen.append(kw["position_ids"]), with_kwargs=True
    )
    model(*args, **kwargs)
    hook.remove()
    return seen


# -- where documents come from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        {"document_ids": torch.tensor([[7, 7, 7, 2, 2, 9]])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2]])},
        {"cu_seq_lens": torch.tensor([0, 3, 5, 6])},
        {"cu_seq_lens": torch.tensor([0, 3, 5, 6], dtype=torch.int32)},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])},
        {"position_ids": torch.tensor([[4, 5, 6, 0, 1, 0]])},
    ],
    ids=["document_ids", "seq_idx", "cu_seq_lens", "cu_seq_lens int32", "position_ids", "positions from 4"],
)
def test_every_source_gives_the_same_documents(source: dict[str, Tensor]) -> None:
    documents = find_documents(1, 6, **source)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert document_positions(documents).tolist() == [[0, 1, 2, 0, 1, 0]]


def test_nothing_given_means_no_documents() -> None:
    assert find_documents(2, 6) is None
    assert find_documents(2, 6, attention_mask=torch.ones(2, 6)) is None
    assert find_documents(1, 6, position_ids=torch.arange(3, 9)[None]) is None, "one run, wherever it starts"


def test_document_is_one_run_of_equal_ids() -> None:
    documents = find_documents(2, 5, document_ids=torch.tensor([[3, 3, 1, 3, 3], [0, 0, 0, 0, 0]]))
    assert documents.tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]


def test_padding_is_minus_one_by_id_or_by_mask() -> None:
    by_id = find_documents(1, 6, document_ids=torch.tensor([[0, 0, 1, 1, -1, -1]]))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    by_mask = find_documents(1, 6, document_ids=torch.tensor([[0, 0, 1, 1, 1, 1]]), attention_mask=mask)
    assert by_id.tolist() == by_mask.tolist() == [[0, 0, 1, 1, -1, -1]]
    assert document_positions(by_id).tolist() == [[0, 1, 0, 1, 0, 1]]


def test_first_source_in_the_documented_order_decides() -> None:
    sources: dict[str, Tensor] = {
        "document_ids": torch.tensor([[0, 1, 1, 1]]),
        "seq_idx": torch.tensor([[0, 0, 1, 1]]),
        "cu_seq_lens": torch.tensor([0, 3, 4]),
        "position_ids": torch.tensor([[0, 0, 0, 0]]),
    }
    found = []
    while sources:
        found.append(find_documents(1, 4, **sources).tolist()[0])
        del sources[next(iter(sources))]
    assert found == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 2, 3]]


def test_positions_of_one_row_serve_the_batch() -> None:
    documents = find_documents(3, 4, position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert documents.tolist() == [[0, 0, 1, 1]] * 3


@pytest.mark.parametrize(
    "rows, source",
    [
        (1, {"document_ids": torch.zeros(1, 5, dtype=torch.long)}),
        (2, {"document_ids": torch.zeros(1, 4, dtype=torch.long)}),
        (1, {"seq_idx": torch.zeros(4, dtype=torch.long)}),
        (2, {"cu_seq_lens": torch.tensor([0, 2, 4])}),
        (1, {"cu_seq_lens": torch.tensor([[0, 2, 4]])}),
        (1, {"cu_seq_lens": torch.tensor([0, 3])}),
        (1, {"cu_seq_lens": torch.tensor([0, 3, 9])}),
        (1, {"cu_seq_lens": torch.tensor([1, 4])}),
    ],
    ids=["longer", "one row of two", "flat", "cu of two rows", "cu with two axes", "cu short", "cu long", "cu from 1"],
)
def test_source_that_does_not_cover_the_batch_is_refused(rows: int, source: dict[str, Tensor]) -> None:
    with pytest.raises(ShapeMismatchError, match=next(iter(source))):
        find_documents(rows, 4, **source)


# -- positions --------------------------------------------------------------------------------------------------------


def test_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0, 1]])
    ids = torch.randint(0, 64, (1, 6))
    for given in (mask, mask.bool(), mask.float()):
        assert seen_positions(tiny_model(), ids, attention_mask=given)[0].tolist() == [[0, 0, 0, 1, 0, 2]]


@pytest.mark.parametrize("real", [1, 2, 255, 0.5, True], ids=str)
def test_any_mask_value_but_zero_marks_a_real_token(real: Any) -> None:
    model, ids = tiny_model(), torch.randint(0, 64, (1, 6))
    mask = torch.full((1, 6), real)
    mask[0, :2] = 0
    exact = model(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])).logits
    assert torch.equal(model(ids, attention_mask=mask).logits, exact)


def test_positions_continue_after_cached_tokens() -> None:
    model = tiny_model()
    ids = torch.randint(0, 64, (1, 7))
    cache = model(ids[:, :4], use_cache=True).past_key_values
    assert seen_positions(model, ids[:, 4:], past_key_values=cache)[0].tolist() == [[4, 5, 6]]


def test_positions_continue_after_padded_cached_tokens() -> None:
    model = tiny_model()
    ids, mask = torch.randint(0, 64, (2, 7)), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    (positions,) = seen_positions(model, ids[:, 4:], attention_mask=mask, past_key_values=cache)
    assert positions.tolist() == [[2, 3, 4], [4, 5, 6]]


@pytest.mark.parametrize(
    "source",
    [
        {"document_ids": torch.tensor([[5, 5, 5, 1, 1, 1]])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 6])},
    ],
    ids=lambda source: next(iter(source)),
)
def test_packed_positions_restart_unless_attention_crosses_boundaries(source: dict[str, Tensor]) -> None:
    ids = torch.randint(0, 64, (1, 6))
    assert seen_positions(tiny_model(), ids, **source)[0].tolist() == [[0, 1, 2, 0, 1, 2]]
    crossing = tiny_model(tiny_config(document_boundary_attention=False))
    assert seen_positions(crossing, ids, **source)[0].tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("shape", [(1, 5), (3, 6), (6,), (2, 6, 1)])
def test_positions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatchError, match="position_ids"):
        tiny_model()(torch.zeros(2, 6, dtype=torch.long), position_ids=torch.zeros(shape, dtype=torch.long))


def test_position_beyond_the_trained_range_is_an_error_without_rotary_scaling() -> None:
    ids = torch.zeros(1, 9, dtype=torch.long)
    model = tiny_model(tiny_config(max_position_embeddings=8))
    assert model(ids[:, :8]).logits.isfinite().all()
    with pytest.raises(InvalidConfigError, match="position 8 is beyond max_position_embeddings=8"):
        model(ids)
    with pytest.raises(InvalidConfigError, match="position 8"):
        model(ids[:, :2], position_ids=torch.tensor([[7, 8]]))
    with pytest.raises(InvalidConfigError, match="-1 is negative"):
        model(ids[:, :2], position_ids=torch.tensor([[-1, 0]]))
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(InvalidConfigError, match="position 8"):
        model(ids[:, :1], past_key_values=cache)
    rope = {"rope_type": "linear", "factor": 2.0}
    scaled = tiny_model(tiny_config(max_position_embeddings=8, rope_parameters=rope))
    assert scaled(ids).logits.isfinite().all()


def test_padding_counts_no_positions_towards_the_limit() -> None:
    model = tiny_model(tiny_config(max_position_embeddings=4))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert model(torch.zeros(1, 7, dtype=torch.long), attention_mask=mask).logits.isfinite().all()


# -- masks against brute force ----------------------------------------------------------------------------------------


def visible_by_hand(
    queries: range,
    real: list[list[int]],
    documents: list[list[int]] | None,
    window: int | None,
    global_tokens: int,
) -> Tensor:
    """Which key each query may see, cell by cell; keys are numbered like the tokens of the whole row."""
    rows, keys = len(real), len(real[0])
    out = torch.zeros(rows, 1, len(queries), keys, dtype=torch.bool)
    for b in range(rows):
        order: dict[int, int] = {}  # number of each real token within its document
        counts: dict[int, int] = {}
        for k in range(keys):
            if real[b][k]:
                document = documents[b][k] if documents else 0
                order[k] = counts.get(document, 0)
                counts[document] = order[k] + 1
        for i, q in enumerate(queries):
            for k in range(q + 1):
                same = documents is None or documents[b][q] == documents[b][k]
                near = window is None or q - k < window or order.get(k, keys) < global_tokens
                out[b, 0, i, k] = bool(real[b][k]) and same and near
    return out


def as_visible(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask of any backend as booleans; None stands for plain causality."""
    if mask is None:
        return torch.ones_like(like).tril(like.shape[-1] - like.shape[-2])
    return mask.expand_as(like) if mask.dtype == torch.bool else (mask == 0).expand_as(like)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("global_tokens", [0, 2])
@pytest.mark.parametrize("layout", ["plain", "left padding", "right padding", "documents"])
def test_masks_equal_the_rules_cell_by_cell(layout: str, global_tokens: int, backend: str) -> None:
    config = tiny_config(**SLIDING, global_tokens=global_tokens)
    config._attn_implementation = backend
    real = {
        "left padding": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
        "right padding": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9],
    }.get(layout, [[1] * 9, [1] * 9])
    ids = [[0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2, 2, 2]] if layout == "documents" else None
    documents = None if ids is None else find_documents(2, 9, document_ids=torch.tensor(ids))
    attention_mask = None if layout in ("plain", "documents") else torch.tensor(real)
    masks = build_masks(config, torch.zeros(2, 9, 32), attention_mask, None, torch.arange(9)[None], documents)
    assert set(masks) == {"full_attention", "sliding_attention"}
    is_real = torch.tensor(real, dtype=torch.bool)[:, None, :, None]  # what padding queries see is of no interest
    for kind, window in (("full_attention", None), ("sliding_attention", 3)):
        expected = visible_by_hand(range(9), real, ids, window, global_tokens if window else 0)
        got = as_visible(masks[kind], expected)
        assert torch.equal(got & is_real, expected & is_real), kind


@pytest.mark.parametrize("global_tokens", [0, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("new", [1, 3])
def test_masks_of_new_tokens_after_cached_ones_equal_the_rules(new: int, padded: bool, global_tokens: int) -> None:
    """With global tokens the cache keeps everything; without, sliding layers are compared through the logits."""
    config = tiny_config(**SLIDING, global_tokens=global_tokens)
    model = tiny_model(config).double()
    ids = torch.randint(0, 64, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    cache = model(ids[:, : 9 - new], attention_mask=mask[:, : 9 - new], use_cache=True).past_key_values
    if global_tokens:
        config._attn_implementation = "eager"
        masks = build_masks(config, torch.zeros(2, new, 32), mask, cache)
        for kind, window in (("full_attention", None), ("sliding_attention", 3)):
            expected = visible_by_hand(range(9 - new, 9), mask.tolist(), None, window, 2 if window else 0)
            assert torch.equal(as_visible(masks[kind], expected), expected), kind
    # Kernels for other shapes sum float64 in another order.
    torch.testing.assert_close(
        model(ids[:, 9 - new :], attention_mask=mask, past_key_values=cache).logits,
        model(ids, attention_mask=mask).logits[:, 9 - new :],
        rtol=1e-11,
        atol=1e-11,
    )


def test_window_hides_what_lies_further_back_and_global_tokens_stay() -> None:
    """Only the core slides here, one loop: token 0 reaches the last query through the prelude, so look at the core."""
    for global_tokens, reaches in ((0, False), (1, True)):
        config = tiny_config(
            **SLIDING, num_prelude_blocks=0, num_coda_blocks=0, global_tokens=global_tokens, default_loops=1
        )
        model = tiny_model(config)
        ids = torch.randint(0, 64, (1, 8))
        changed = ids.clone()
        changed[0, 0] = (ids[0, 0] + 1) % 64
        difference = (model(changed).logits - model(ids).logits)[0].abs().amax(-1)
        assert (difference[:3] > 0).all(), "within the window"
        assert bool((difference[3:] > 0).all()) == reaches and bool((difference[3:] > 0).any()) == reaches


# -- documents through the whole model --------------------------------------------------------------------------------


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
@pytest.mark.parametrize("injection", ["residual", "attention_memory"])
def test_changing_one_document_never_changes_another(injection: str, loops: int) -> None:
    model = tiny_model(tiny_config(input_injection=injection))
    ids = torch.randint(0, 64, (1, 9))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]])
    changed = ids.clone()
    changed[0, 3:6] = (ids[0, 3:6] + 1) % 64
    before, after = (model(x, document_ids=documents, num_loops=loops).logits for x in (ids, changed))
    others = documents[0] != 1
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 3:6], after[:, 3:6])


@pytest.mark.parametrize("source", ["document_ids", "seq_idx", "cu_seq_lens_q", "position_ids"])
@pytest.mark.parametrize("overrides", [{}, {**SLIDING, "global_tokens": 1}, {"recurrent_init": "random"}], ids=str)
def test_packed_documents_give_the_logits_of_each_alone(overrides: dict[str, Any], source: str) -> None:
    model = tiny_model(tiny_config(**overrides)).double()
    ids = torch.randint(0, 64, (1, 10))
    packing = {
        "document_ids": torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2, 2, 2]]),
        "seq_idx": torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2, 2, 2]]),
        "cu_seq_lens_q": torch.tensor([0, 1, 4, 10]),
        "position_ids": torch.tensor([[0, 0, 1, 2, 0, 1, 2, 3, 4, 5]]),
    }
    alone = torch.cat([model(part).logits for part in ids.split([1, 3, 6], dim=1)], dim=1)
    # Kernels for other shapes sum float64 in another order.
    torch.testing.assert_close(model(ids, **{source: packing[source]}).logits, alone, rtol=1e-11, atol=1e-11)


def test_padding_of_a_packed_row_changes_no_real_token_and_gives_finite_numbers() -> None:
    model = tiny_model().double()
    ids = torch.randint(0, 64, (1, 8))
    documents = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1]])
    padded = model(ids, document_ids=documents).logits
    exact = model(ids[:, :5], document_ids=documents[:, :5]).logits
    torch.testing.assert_close(padded[:, :5], exact, rtol=1e-11, atol=1e-11)  # as above
    assert padded.isfinite().all()


def test_attention_crosses_boundaries_only_where_that_is_configured() -> None:
    model = tiny_model(tiny_config(document_boundary_attention=False))
    ids, documents = torch.randint(0, 64, (1, 6)), torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.equal(model(ids, document_ids=documents).logits, model(ids).logits)


# -- masks of the wrong shape -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 5), (1, 6), (2, 6, 6), (6,), (2, 1, 6, 5), (2, 1, 5, 6), (3, 1, 6, 6), (2, 3, 6, 6)]
)
def test_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """A finished mask has one row per query, one column per key and one head or all four."""
    with pytest.raises(ShapeMismatchError, match="attention_mask"):
        tiny_model()(torch.zeros(2, 6, dtype=torch.long), attention_mask=torch.ones(shape, dtype=torch.bool))


def test_finished_masks_are_used_as_they_are() -> None:
    model = tiny_model()
    ids, causal = torch.randint(0, 64, (2, 6)), torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    plain = model(ids).logits
    # The kernel with a mask may sum in another order than the one told to be causal.
    for given in (causal, causal.expand(2, 1, 6, 6), {"full_attention": causal}):
        torch.testing.assert_close(model(ids, attention_mask=given).logits, plain, rtol=0, atol=2e-5)
    narrow = causal.clone()
    narrow[..., 5, 0] = False
    assert not torch.allclose(model(ids, attention_mask=narrow).logits[:, 5], plain[:, 5], atol=1e-3)


def test_compiled_plain_batch_leaves_causality_to_the_backend() -> None:
    masks: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        masks.extend(
            node.kwargs
            for node in graph.graph.nodes
            if node.target is torch.nn.functional.scaled_dot_product_attention
        )
        return graph

    torch._dynamo.reset()
    model, ids = tiny_model(), torch.arange(3, 15)[None]
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    logits = compiled(ids, num_loops=2, use_cache=False).logits
    torch._dynamo.reset()
    torch.testing.assert_close(logits, model(ids, num_loops=2).logits, rtol=1e-5, atol=1e-5)
    assert len(masks) == model.config.num_prelude_blocks + 2 + model.config.num_coda_blocks
    assert all(mask["is_causal"] is True and mask["attn_mask"] is None for mask in masks)
