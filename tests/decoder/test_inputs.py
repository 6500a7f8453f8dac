"""What a caller hands to the model: shapes, dtypes, masks, positions, packed documents, devices and lengths.

Everything runs through ``forward`` and, where it applies, ``generate``: a fault is a typed error that names the
argument, and what is accepted gives the right result.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import utils as generation_utils

from cognexis import CognexisForCausalLM
from cognexis.decoder import request_checks
from cognexis.errors import CacheError, InvalidConfigError, InvalidTokenIdError, ShapeMismatchError
from tests.batteries.invariance import assert_same, cached_logits, left_padding, logits_of, token_ids
from tests.batteries.tiny import tiny_config, tiny_model

NAN = float("nan")


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 2
    return model


@pytest.fixture
def ids(model: Any) -> Tensor:
    return token_ids(model, 2, 6)


def forward(model: Any, ids: Any, **kwargs: Any) -> Tensor:
    return logits_of(model, ids, 2, **kwargs)


def generate(model: Any, ids: Any, **kwargs: Any) -> Tensor:
    return model.generate(ids, **{"max_new_tokens": 2, "do_sample": False, "num_loops": 2} | kwargs)


@pytest.fixture(params=["eager", "sdpa"])
def backend(request: pytest.FixtureRequest, model: Any) -> Iterator[str]:
    """Runs the test with either attention implementation."""
    model.set_attn_implementation(request.param)
    yield request.param
    model.set_attn_implementation("sdpa")


BOTH = pytest.mark.parametrize("call", [forward, generate])


# -- token ids -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (0, 0), (4,), (), (1, 1, 4)], ids=str)
def test_ids_of_another_shape_are_refused(model: Any, call: Callable[..., Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatchError, match="input_ids must have shape") as caught:
        call(model, torch.zeros(shape, dtype=torch.long))
    assert caught.value.actual == shape


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.complex64], ids=str)
def test_ids_that_are_no_integers_are_refused(model: Any, call: Callable[..., Any], dtype: torch.dtype) -> None:
    with pytest.raises(InvalidTokenIdError, match=f"input_ids.*got {dtype}"):
        call(model, torch.zeros(1, 4, dtype=dtype))


@BOTH
@pytest.mark.parametrize("given", [[[3, 4]], "text", 3], ids=str)
def test_ids_that_are_no_tensor_are_refused(model: Any, call: Callable[..., Any], given: Any) -> None:
    with pytest.raises(InvalidTokenIdError, match="input_ids: must be a tensor"):
        call(model, given)


@BOTH
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_narrow_integers_are_ids_like_any_other(
    model: Any, ids: Tensor, call: Callable[..., Any], dtype: torch.dtype
) -> None:
    assert torch.equal(call(model, ids.to(dtype)), call(model, ids))


@BOTH
@pytest.mark.parametrize("wrong", [64, -1, 2**40, -(2**40)])
def test_ids_outside_the_vocabulary_are_refused(model: Any, ids: Tensor, call: Callable[..., Any], wrong: int) -> None:
    bad = ids.clone()
    bad[1, 3] = wrong
    with pytest.raises(InvalidTokenIdError, match=f"id {wrong} is outside the vocabulary, 0 to 63") as caught:
        call(model, bad)
    assert caught.value.token_id == wrong
    assert isinstance(caught.value, IndexError)


@BOTH
def test_strided_and_expanded_ids_are_read_as_they_look(model: Any, ids: Tensor, call: Callable[..., Any]) -> None:
    strided = ids.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(call(model, strided), call(model, ids))
    expanded = ids[:1].expand(3, -1)
    assert torch.equal(call(model, expanded), call(model, expanded.contiguous()))


@pytest.mark.gpu
@BOTH
def test_a_model_on_another_device_is_named_or_served(model: Any, ids: Tensor, call: Callable[..., Any]) -> None:
    on_device = copy.deepcopy(model).cuda()
    if call is generate:  # ids are moved
        assert torch.equal(call(on_device, ids).cpu(), call(on_device, ids.cuda()).cpu())
        return
    with pytest.raises(RuntimeError, match=r"(cuda.*cpu|cpu.*cuda)"):
        call(on_device, ids)


def test_embeddings_on_another_device_are_refused_with_both_names(model: Any) -> None:
    with pytest.raises(RuntimeError, match=r"(meta.*cpu|cpu.*meta)"):
        model(inputs_embeds=torch.randn(1, 4, 32, device="meta"))


@pytest.mark.parametrize(
    "embeds",
    [
        torch.randn(4, 32),
        torch.randn(1, 4, 31),
        torch.randn(1, 0, 32),
        torch.ones(1, 4, 32, dtype=torch.long),
    ],
    ids=["two_axes", "width", "no_token", "integers"],
)
def test_embeddings_of_another_shape_or_dtype_are_refused(model: Any, embeds: Tensor) -> None:
    for call in (lambda: model(inputs_embeds=embeds), lambda: model.generate(inputs_embeds=embeds)):
        with pytest.raises(ShapeMismatchError, match="inputs_embeds must be floating point") as caught:
            call()
        assert caught.value.actual == tuple(embeds.shape)


def test_exactly_one_of_ids_and_embeddings_is_needed(model: Any, ids: Tensor) -> None:
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": model.model.embed_tokens(ids)}):
        with pytest.raises(InvalidConfigError, match="exactly one of input_ids and inputs_embeds") as caught:
            model(**arguments)
        assert caught.value.path == "input_ids"
    with pytest.raises(InvalidConfigError, match="a prompt of at least one token") as caught:
        model.generate()
    assert caught.value.path == "input_ids"


def test_embeddings_give_what_their_ids_give(model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        embedded = model(inputs_embeds=model.model.embed_tokens(ids), num_loops=2).logits
    assert torch.equal(embedded, forward(model, ids))


@pytest.mark.parametrize(
    "name, nearest", [("num_loop", "num_loops"), ("loops", "num_loops"), ("lop_mode", "loop_mode")]
)
def test_forward_refuses_a_misspelt_loop_argument(model: Any, ids: Tensor, name: str, nearest: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"'{name}'.*did you mean '{nearest}'") as caught:
        model(ids, **{name: 2})
    assert caught.value.path == name


@pytest.mark.parametrize("value", [0, -1, 5, 2.0, NAN, "2", True, torch.tensor([[2]]), torch.tensor(2.0)], ids=str)
def test_forward_refuses_a_loop_count_out_of_range(model: Any, ids: Tensor, value: Any) -> None:
    with pytest.raises(InvalidConfigError, match="num_loops") as caught:
        model(ids, num_loops=value)
    assert caught.value.path == "num_loops"


def test_forward_reports_the_loops_it_ran(ids: Tensor) -> None:
    model = tiny_model(tiny_config(num_prelude_blocks=3, num_coda_blocks=2, default_loops=3))
    applications: list[int] = []
    model.model.recurrent.loop_state.register_forward_hook(lambda *_: applications.append(1))
    for given, loops in ((None, 3), (1, 1), (torch.tensor(4), 4)):
        applications.clear()
        output = model(ids, num_loops=given, return_loop_stats=True)
        assert len(applications) == loops
        assert output.loop_counts.tolist() == [loops, loops]
        assert output.effective_depth.tolist() == [5 + loops] * 2
        assert output.halt_reasons == ["max_loops"] * 2
        diagnostics = output.loop_diagnostics
        assert (diagnostics.loop_mode, diagnostics.input_injection) == ("fixed", "residual")
        assert (diagnostics.requested_loops, diagnostics.executed_loops) == (loops, loops)
        assert diagnostics.norms.shape == diagnostics.is_finite.shape == (loops + 1,)
        assert diagnostics.gate_mean.shape == (loops,)
        assert (diagnostics.gate_mean > 0).all() and (diagnostics.gate_mean < 1).all()
        assert diagnostics.extrapolated is False


# -- masks ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (3, 6), (1, 6), (6,), (2, 1, 6)], ids=str)
def test_a_mask_of_another_shape_is_refused(
    model: Any, ids: Tensor, call: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeMismatchError, match="attention_mask must have"):
        call(model, ids, attention_mask=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (2, 1, 6, 5), (3, 1, 6, 6), (2, 3, 6, 6)], ids=str)
def test_a_finished_mask_of_another_shape_is_refused(
    model: Any, ids: Tensor, backend: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeMismatchError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(shape, dtype=torch.bool))


@BOTH
@pytest.mark.parametrize("given", [[[1] * 6] * 2, "mask"], ids=["list", "text"])
def test_a_mask_that_is_no_tensor_is_refused(model: Any, ids: Tensor, call: Callable[..., Any], given: Any) -> None:
    with pytest.raises(ShapeMismatchError, match="attention_mask"):
        call(model, ids, attention_mask=given)


@BOTH
@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_whatever_is_not_zero_marks_a_real_token(
    model: Any, ids: Tensor, call: Callable[..., Any], dtype: torch.dtype, value: int
) -> None:
    mask = left_padding([6, 4])
    expected = call(model, ids, attention_mask=mask)
    given = call(model, ids, attention_mask=(mask * value).to(dtype))
    real = mask.bool() if call is forward else torch.ones_like(expected, dtype=torch.bool)
    assert torch.equal(given[real], expected[real])


def test_a_finished_mask_is_used_as_it_is(model: Any, ids: Tensor) -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, additive):
        assert_same(forward(model, ids, attention_mask=mask), forward(model, ids), 2, "causal 4-D mask")
    everything = forward(model, ids, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool))
    assert (everything[:, 0] - forward(model, ids)[:, 0]).abs().max() > 1e-2
    by_type = forward(model, ids, attention_mask={"full_attention": causal})
    assert_same(by_type, forward(model, ids), 2, "masks by layer type")


def test_generate_refuses_a_finished_mask(model: Any, ids: Tensor) -> None:
    with pytest.raises(ShapeMismatchError, match="attention_mask must have"):
        generate(model, ids, attention_mask=torch.ones(2, 1, 6, 6))


def test_generate_refuses_a_row_without_a_token(model: Any, ids: Tensor) -> None:
    for mask in (torch.zeros(2, 6), torch.tensor([[1] * 6, [0] * 6])):
        with pytest.raises(InvalidConfigError, match="a row has no real token") as caught:
            generate(model, ids, attention_mask=mask)
        assert caught.value.path == "attention_mask"


@BOTH
def test_a_token_in_a_hole_of_the_mask_is_as_if_it_were_not_there(
    model: Any, ids: Tensor, call: Callable[..., Any]
) -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0, 1]]).expand(2, -1)
    kept = mask[0].bool()
    with_holes = call(model, ids, attention_mask=mask)
    without = call(model, ids[:, kept])
    if call is forward:
        assert_same(with_holes[:, kept], without, 2, "row with holes")
    else:
        assert torch.equal(with_holes[:, 6:], without[:, 4:])


@pytest.mark.parametrize("side", ["left", "whole row"])
def test_a_query_without_a_visible_key_is_finite_and_its_gradients_too(
    model: Any, ids: Tensor, backend: str, side: str
) -> None:
    mask = left_padding([6, 3]) if side == "left" else torch.tensor([[1] * 6, [0] * 6])
    model.zero_grad()
    logits = model(ids, attention_mask=mask, num_loops=3).logits
    assert logits.isfinite().all()
    logits.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 20
    assert all(g.isfinite().all() for g in gradients)
    model.zero_grad()


def test_a_query_without_a_visible_key_is_the_same_in_both_backends(model: Any, ids: Tensor) -> None:
    mask, results = torch.tensor([[1] * 6, [0] * 6]), []
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        results.append(forward(model, ids, attention_mask=mask))
    assert_same(results[1], results[0], 2, "rows without a key")


@pytest.mark.parametrize("rows", [1, 2])
def test_right_padding_in_generation_is_warned_of_or_correct(
    model: Any, ids: Tensor, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    for logger in (generation_utils.logger, request_checks.logger):
        monkeypatch.setattr(logger, "warning", lambda text, *_: warnings.append(text))
    mask = left_padding([6, 4]).flip(1)[-rows:]
    output = generate(model, ids[-rows:], attention_mask=mask)
    if not any("right-padding" in text for text in warnings):
        assert torch.equal(output[-1, 6:], generate(model, ids[-1:, :4])[0, 4:])


# -- positions -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [(1, 5), (1, 7), (3, 6), (6,), (1, 1, 6)], ids=str)
def test_positions_of_another_shape_are_refused(
    model: Any, ids: Tensor, call: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    positions = torch.arange(shape[-1]).expand(shape)
    with pytest.raises(ShapeMismatchError, match="position_ids must have shape"):
        call(model, ids, position_ids=positions)


@BOTH
@pytest.mark.parametrize("shift, named", [(-1, "-1 is negative"), (123, "position 128 is beyond")])
def test_positions_out_of_range_are_refused(
    model: Any, ids: Tensor, call: Callable[..., Any], shift: int, named: str
) -> None:
    with pytest.raises(InvalidConfigError, match=named) as caught:
        call(model, ids, position_ids=torch.arange(6)[None] + shift)
    assert caught.value.path == "position_ids"


def test_positions_count_real_tokens_from_zero(model: Any, ids: Tensor) -> None:
    mask = left_padding([6, 4])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    given = forward(model, ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(given, forward(model, ids, attention_mask=mask))


def test_the_first_decoded_token_takes_the_position_after_the_prompt(model: Any, ids: Tensor) -> None:
    seen: list[list[int]] = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    generate(model, ids[:1, :3], max_new_tokens=3)
    hook.remove()
    assert seen == [[0, 1, 2], [3], [4]]


# -- lengths -------------------------------------------------------------------------------------------------------


def test_a_prompt_may_fill_every_position_and_no_more(model: Any) -> None:
    full = token_ids(model, 1, 128)
    assert forward(model, full).shape == (1, 128, 64)
    assert generate(model, full, max_new_tokens=1).shape == (1, 129)
    assert generate(model, full[:, :126], max_new_tokens=3).shape == (1, 129)
    longer = token_ids(model, 1, 129)
    with pytest.raises(InvalidConfigError, match="position 128 is beyond max_position_embeddings=128"):
        forward(model, longer)
    with pytest.raises(
        InvalidConfigError, match="a prompt of 129 tokens exceeds max_position_embeddings=128"
    ) as caught:
        generate(model, longer)
    assert caught.value.path == "input_ids"
    with pytest.raises(InvalidConfigError, match="leaves room for 1 ") as caught:
        generate(model, full, max_new_tokens=2)
    assert caught.value.path == "max_new_tokens"


def test_padding_takes_no_position(model: Any) -> None:
    ids = token_ids(model, 1, 130)
    mask = left_padding([120, 130])[:1]
    assert_same(
        forward(model, ids, attention_mask=mask)[:, 10:],
        forward(model, ids[:, 10:]),
        2,
        "120 tokens behind 10 of padding",
    )


def test_rotary_scaling_lifts_the_length_limit() -> None:
    scaled = tiny_model(tiny_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}))
    assert forward(scaled, token_ids(scaled, 1, 140)).isfinite().all()
    assert generate(scaled, token_ids(scaled, 1, 127), max_new_tokens=4, eos_token_id=None).shape == (1, 131)


# -- packed documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["document_ids", "seq_idx"])
@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (6,), (2, 6, 1)], ids=str)
def test_documents_that_do_not_cover_the_batch_are_refused(
    model: Any, ids: Tensor, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeMismatchError, match=rf"{name} must have shape \(2, 6\)") as caught:
        model(ids, **{name: torch.zeros(shape, dtype=torch.long)})
    assert caught.value.actual == shape


@pytest.mark.parametrize(
    "boundaries",
    [[0, 3, 9], [0, 4, 2, 6], [[0, 3, 6]], []],
    ids=["beyond_the_row", "falling", "two_axes", "empty"],
)
def test_cumulative_lengths_that_do_not_describe_the_row_are_refused(
    model: Any, ids: Tensor, boundaries: list[Any]
) -> None:
    with pytest.raises((ShapeMismatchError, InvalidConfigError), match="cu_seq_lens"):
        model(ids[:1], cu_seq_lens_q=torch.tensor(boundaries, dtype=torch.int32))


def test_cumulative_lengths_describe_a_single_row(model: Any, ids: Tensor) -> None:
    with pytest.raises(ShapeMismatchError, match="2 rows"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, 6], dtype=torch.int32))


def test_document_ids_go_before_the_other_forms(model: Any, ids: Tensor) -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = forward(model, ids[:1], document_ids=documents)
    others = {"seq_idx": torch.zeros(1, 6, dtype=torch.int32), "cu_seq_lens_q": torch.tensor([0, 5, 6])}
    assert torch.equal(forward(model, ids[:1], document_ids=documents, **others), expected)
    others = {"cu_seq_lens_q": torch.tensor([0, 5, 6])}
    assert torch.equal(forward(model, ids[:1], seq_idx=documents, **others), expected)


def test_packed_documents_do_not_continue_a_cache(model: Any, ids: Tensor) -> None:
    cache = model(ids[:, :3], use_cache=True, num_loops=2).past_key_values
    documents = torch.tensor([[0, 0, 1], [0, 1, 1]])
    for packing in ({"document_ids": documents}, {"position_ids": torch.tensor([[0, 1, 0]])}):
        with pytest.raises(CacheError, match="packed documents cannot continue a cache"):
            model(ids[:, 3:], past_key_values=cache, num_loops=2, **packing)
    assert cache.get_seq_length() == 3


def test_consecutive_positions_are_no_documents(model: Any, ids: Tensor) -> None:
    output = model(ids, position_ids=torch.arange(6)[None], num_loops=2)
    assert output.past_key_values.get_seq_length() == 6
    assert torch.equal(output.logits, forward(model, ids))


# -- sizes, devices and modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2])
def test_a_single_row_of_one_or_two_tokens_runs(model: Any, length: int) -> None:
    ids = token_ids(model, 1, length)
    logits = forward(model, ids)
    assert logits.shape == (1, length, 64)
    assert_same(logits[:, :1], forward(model, token_ids(model, 1, 2))[:, :1], 2, "first token")
    assert generate(model, ids).shape == (1, length + 2)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"recurrent_init": "random"}, {"input_injection": "concat_project"}],
    ids=["plain", "random", "concat"],
)
def test_an_odd_width_runs(overrides: dict[str, Any]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.8}
    sizes = {"hidden_size": 15, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 7}
    model = tiny_model(tiny_config(**sizes, rope_parameters=rope, gate_loop_embedding=True, **overrides)).double()
    ids = token_ids(model, 2, 7)
    cache = model(ids[:, :4], num_loops=3, use_cache=True).past_key_values
    steps = cached_logits(model, ids, 3, cache, [1, 2])
    assert_same(steps, logits_of(model, ids, 3)[:, 4:], 3, "odd width")


@pytest.mark.parametrize("training", [False, True])
def test_shapes_are_known_on_the_meta_device(ids: Tensor, training: bool) -> None:
    with torch.device("meta"):
        shapes = CognexisForCausalLM(tiny_config()).train(training)
    output = shapes(ids.to("meta"), num_loops=3, use_cache=False, labels=ids.to("meta"))
    assert (output.logits.shape, output.logits.device.type) == ((2, 6, 64), "meta")
    assert output.loss.shape == ()
    assert output.loop_counts.shape == (2,)


def test_the_size_of_a_cache_is_known_on_the_meta_device(ids: Tensor) -> None:
    with torch.device("meta"):
        shapes = CognexisForCausalLM(tiny_config()).eval()
    cache = shapes(ids.to("meta"), num_loops=3, use_cache=True).past_key_values
    assert shapes(ids[:, :1].to("meta"), num_loops=3, past_key_values=cache).logits.shape == (2, 1, 64)
    assert cache.memory_bytes() == 2 * 6 * 2 * 2 * 7 * 8 * 4


def test_inference_mode_copies_and_pickles_give_the_same(model: Any, ids: Tensor) -> None:
    expected = forward(model, ids)
    with torch.inference_mode():
        assert torch.equal(model(ids, num_loops=2).logits, expected)
    assert torch.equal(forward(copy.deepcopy(model), ids), expected)
    assert torch.equal(forward(pickle.loads(pickle.dumps(model)), ids), expected)


def test_a_copy_shares_no_parameter(model: Any, ids: Tensor) -> None:
    expected = forward(model, ids)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(forward(model, ids), expected)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_double_precision_is_not_rounded_on_the_way(model: Any, ids: Tensor) -> None:
    """In float32 the result would differ from the exact one by about 1e-6."""
    double = copy.deepcopy(model).double()
    assert forward(double, ids).dtype == torch.float64
    shifted = copy.deepcopy(double)
    shifted.model.embed_tokens.weight.data += 1e-12 * torch.randn_like(shifted.model.embed_tokens.weight)
    moved = (forward(shifted, ids) - forward(double, ids)).abs().max()
    assert 0 < moved < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near_single(model: Any, ids: Tensor, dtype: torch.dtype) -> None:
    half = forward(copy.deepcopy(model).to(dtype), ids)
    assert half.dtype == dtype
    steps = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    # each of about 5 blocks rounds values of up to 4 several times
    assert (half.float() - forward(model, ids)).abs().max() < 40 * steps


def test_repeated_runs_are_equal_to_the_last_bit(model: Any, ids: Tensor) -> None:
    assert torch.equal(forward(model, ids), forward(model, ids))
    assert torch.equal(generate(model, ids, max_new_tokens=6), generate(model, ids, max_new_tokens=6))


@pytest.mark.slow
def test_a_compiled_forward_is_one_graph_with_the_same_result(model: Any, ids: Tensor) -> None:
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    for loops in (1, 3):
        with torch.no_grad():
            output = compiled(ids, num_loops=loops, use_cache=False)
        assert_same(output.logits, logits_of(model, ids, loops), loops, "compiled")
    torch.compiler.reset()
