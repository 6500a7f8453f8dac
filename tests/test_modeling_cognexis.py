"""Body, head and task heads: embedding, tying, names, gradients of the shared core, Llama equality, refusals."""

import copy
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cognexis import (
    CognexisForCausalLM,
    CognexisForQuestionAnswering,
    CognexisForSequenceClassification,
    CognexisForTokenClassification,
    CognexisModel,
)
from cognexis.errors import InvalidConfigError, InvalidTokenIdError, NonFiniteError, ShapeMismatchError
from tests.batteries.tiny import tiny_config, tiny_model

INJECTIONS = ("none", "residual", "concat_project", "gate_condition", "attention_memory")
# Kernels for other shapes sum float64 in another order; four loops of it.
FLOAT64_NOISE = 1e-11


def random_ids(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 64, (rows, length))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


# -- embedding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, length", itertools.product([1, 2, 7], [1, 5, 33]))
def test_shapes_follow_batch_and_length(rows: int, length: int) -> None:
    model = tiny_model()
    out = model(random_ids(rows, length), output_hidden_states=True)
    assert out.logits.shape == (rows, length, 64)
    assert model.model.embed_tokens(random_ids(rows, length)).shape == (rows, length, 32)
    assert out.loop_counts.tolist() == [4] * rows and out.effective_depth.tolist() == [7] * rows


def entering_prelude(model: CognexisForCausalLM, ids: Tensor) -> Tensor:
    """What the first block gets."""
    seen: list[Tensor] = []
    hook = model.model.prelude.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(ids)
    hook.remove()
    return seen[0]


def test_repeated_ids_have_equal_rows_and_padding_is_an_ordinary_row() -> None:
    model = tiny_model()
    rows = entering_prelude(model, torch.tensor([[5, 2, 5], [2, 5, 2]]))
    five, pad = model.model.embed_tokens.weight[5], model.model.embed_tokens.weight[2]
    assert model.config.pad_token_id == 2
    assert torch.equal(rows, torch.stack((torch.stack((five, pad, five)), torch.stack((pad, five, pad)))))


def test_embeddings_may_be_given_directly() -> None:
    model, ids = tiny_model(), random_ids()
    embeds = model.model.embed_tokens(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(InvalidConfigError, match="exactly one of"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(InvalidConfigError, match="exactly one of"):
        model()
    for wrong in (embeds[..., :16], embeds[0], embeds.long(), embeds[:, :0]):
        with pytest.raises(ShapeMismatchError, match="inputs_embeds"):
            model(inputs_embeds=wrong)


def test_scale_multiplies_the_embedding() -> None:
    ids = random_ids()
    plain, doubled = (entering_prelude(tiny_model(tiny_config(embedding_scale=s)), ids) for s in (1.0, 2.0))
    assert torch.equal(doubled, 2 * plain)


def test_embedding_dropout_acts_in_training_only() -> None:
    model, ids = tiny_model(tiny_config(embedding_dropout=0.5)), random_ids(8, 16)
    full = entering_prelude(model, ids)
    assert torch.equal(entering_prelude(model, ids), full)
    dropped = entering_prelude(model.train(), ids)
    kept = dropped != 0
    assert torch.equal(dropped[kept], 2 * full[kept])
    assert 0.45 < kept.float().mean() < 0.55, "4,096 draws of 1/2 lie within six deviations of 0.008"


@pytest.mark.parametrize("bad", [-1, 64, 2**31])
def test_id_outside_the_vocabulary_is_refused_and_named(bad: int) -> None:
    ids = random_ids()
    ids[1, 2] = bad
    for call in (tiny_model(), tiny_model().model):
        with pytest.raises(InvalidTokenIdError, match=f"id {bad} is outside the vocabulary, 0 to 63") as caught:
            call(ids)
        assert caught.value.token_id == bad and isinstance(caught.value, (IndexError, ValueError))


@pytest.mark.parametrize("ids", [torch.full((2, 3), 0.5), torch.ones(2, 3, dtype=torch.bool), [[1, 2]]], ids=str)
def test_ids_that_are_no_integers_are_refused(ids: Any) -> None:
    with pytest.raises(InvalidTokenIdError, match="integer token ids"):
        tiny_model()(ids)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0), (1, 2, 3)])
def test_ids_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatchError, match="input_ids"):
        tiny_model()(torch.zeros(shape, dtype=torch.long))


def test_integer_ids_of_any_width_are_read_alike() -> None:
    model, ids = tiny_model(), random_ids()
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


def test_fresh_weights_have_the_configured_spread() -> None:
    config = tiny_config(vocab_size=50_000, hidden_size=64, initializer_range=0.02, num_prelude_blocks=1)
    model = CognexisForCausalLM(config)
    weights = model.model.embed_tokens.weight
    # 3.2 million numbers: the 5 % of the requirement is 100 deviations, 1 % is 25.
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    special = weights[[config.bos_token_id, config.eos_token_id, config.pad_token_id]]
    assert special.std(dim=1).tolist() == pytest.approx([0.02] * 3, rel=0.4), "64 numbers a row: 9 % is a deviation"
    assert model.model.recurrent.blocks[0].feed_forward.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.06)
    assert {p.unique().item() for n, p in model.named_parameters() if n.endswith("norm.weight")} == {1.0}


# -- tying ------------------------------------------------------------------------------------------------------------


def assert_tied(model: CognexisForCausalLM) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_head_and_embedding_stay_one_parameter(tmp_path: Path) -> None:
    model = CognexisForCausalLM(tiny_config())
    assert_tied(model)
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = random_ids()
    model(ids, labels=ids).loss.backward()
    before = model.lm_head.weight.detach().clone()
    optimizer.step()
    assert_tied(model)
    assert not torch.equal(model.lm_head.weight, before)
    assert_tied(model.to(torch.bfloat16).to(torch.float32))
    assert_tied(copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert [name for name, tensor in stored.items() if tensor.shape == (64, 32)] == ["model.embed_tokens.weight"]
    loaded = CognexisForCausalLM.from_pretrained(tmp_path)
    assert_tied(loaded)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("size", [70, 50])
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_changes_embedding_head_and_configuration_together(size: int, tied: bool) -> None:
    model = tiny_model(tiny_config(tie_word_embeddings=tied, lm_head_bias=True))
    old = model(random_ids() % 50).logits
    rows = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size and model.lm_head.bias.shape == (size,)
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (size, 32)
    if tied:
        assert_tied(model)
    shared = min(size, 64)
    assert torch.equal(model.model.embed_tokens.weight[:shared], rows[:shared])
    assert model(torch.tensor([[size - 1]])).logits.shape == (1, 1, size)
    with pytest.raises(InvalidTokenIdError, match=f"0 to {size - 1}"):
        model(torch.tensor([[size]]))
    assert old.shape[-1] == 64


def test_untied_head_is_a_parameter_of_its_own(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(tie_word_embeddings=False, lm_head_bias=True))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    loaded = CognexisForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# -- head -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_the_product_with_the_head(tied: bool, bias: bool) -> None:
    model, ids = tiny_model(tiny_config(tie_word_embeddings=tied, lm_head_bias=bias)).double(), random_ids()
    hidden = model.model(ids).last_hidden_state
    weight = model.model.embed_tokens.weight if tied else model.lm_head.weight
    expected = hidden @ weight.T + (model.lm_head.bias if bias else 0)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-13)  # another order of float64 sums


def test_kept_positions_are_slices_of_all_logits() -> None:
    model, ids = tiny_model().double(), random_ids(2, 6)
    full = model(ids).logits
    per_row, chosen = torch.tensor([[0, 5], [3, 3]]), torch.rand(2, 6) < 0.5
    cases = {
        0: full,
        1: full[:, -1:],
        4: full[:, -4:],
        torch.tensor([1, 4]): full[:, [1, 4]],
        per_row: torch.stack((full[0, [0, 5]], full[1, [3, 3]])),
        chosen: full[chosen],
    }
    for kept, expected in cases.items():
        # The product over fewer rows may be summed in another order.
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected, rtol=0, atol=1e-13)


# -- stages -----------------------------------------------------------------------------------------------------------


def test_without_coda_the_head_reads_the_normed_state_of_the_last_loop() -> None:
    model = tiny_model(tiny_config(num_coda_blocks=0, state_retention="all"))
    out = model(random_ids())
    expected = model.lm_head(model.model.final_norm(out.loop_states[-1]))
    assert torch.equal(out.logits, expected)
    assert "model.final_norm.weight" in model.state_dict() and model.config.nonstandard_features == ["no_coda"]


def test_final_norm_is_left_out_only_by_name() -> None:
    model = tiny_model(tiny_config(num_coda_blocks=0, state_retention="all", final_norm="none"))
    assert not any("final_norm" in key for key in model.state_dict())
    out = model(random_ids())
    assert torch.equal(out.logits, model.lm_head(out.loop_states[-1]))


@pytest.mark.parametrize("injection", INJECTIONS)
def test_every_loop_count_gives_finite_and_different_logits(injection: str) -> None:
    model, ids = tiny_model(tiny_config(input_injection=injection)), random_ids()
    by_loops = [model(ids, num_loops=n).logits for n in (1, 2, 3, 4)]
    assert all(logits.isfinite().all() for logits in by_loops)
    for one, other in itertools.combinations(by_loops, 2):
        assert not torch.allclose(one, other, atol=1e-3)


def test_evaluation_repeats_bit_by_bit() -> None:
    dropouts = dict.fromkeys(("attention_dropout", "ffn_dropout", "embedding_dropout"), 0.3)
    depths = dict.fromkeys(("prelude_stochastic_depth", "recurrent_stochastic_depth", "coda_stochastic_depth"), 0.3)
    model, ids = tiny_model(tiny_config(**dropouts, **depths)), random_ids()
    first = model(ids).logits
    assert torch.equal(model(ids).logits, first)
    assert not torch.equal(model.train()(ids).logits, first)


def test_core_of_several_blocks_runs_learns_and_decodes() -> None:
    with pytest.raises(InvalidConfigError, match="experimental_multi_block=True"):
        tiny_config(num_recurrent_blocks=2)
    model = tiny_model(tiny_config(num_recurrent_blocks=2, experimental_multi_block=True)).double()
    ids = random_ids()
    out = model(ids, labels=ids, num_loops=3)
    assert out.effective_depth.tolist() == [2 + 2 * 3 + 1] * 2
    out.loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.abs().max() > 0, name
    head = model(ids[:, :4], num_loops=3, use_cache=True)
    tail = model(ids[:, 4:], num_loops=3, past_key_values=head.past_key_values)
    together = torch.cat((head.logits, tail.logits), dim=1)
    torch.testing.assert_close(together, out.logits, rtol=FLOAT64_NOISE, atol=FLOAT64_NOISE)
    assert model.config.nonstandard_features == ["multi_block_core"]


# -- names ------------------------------------------------------------------------------------------------------------

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


def test_names_of_a_plain_model_are_frozen() -> None:
    model = tiny_model(
        tiny_config(num_prelude_blocks=1, recurrent_gating=False, input_injection="none", recurrent_norm="none")
    )
    assert list(model.state_dict()) == [
        "model.embed_tokens.weight",
        "model.prelude.blocks.0.attention_norm.weight",
        "model.prelude.blocks.0.attention.q_proj.weight",
        "model.prelude.blocks.0.attention.k_proj.weight",
        "model.prelude.blocks.0.attention.v_proj.weight",
        "model.prelude.blocks.0.attention.o_proj.weight",
        "model.prelude.blocks.0.feed_forward_norm.weight",
        "model.prelude.blocks.0.feed_forward.gate_proj.weight",
        "model.prelude.blocks.0.feed_forward.up_proj.weight",
        "model.prelude.blocks.0.feed_forward.down_proj.weight",
        "model.recurrent.blocks.0.attention_norm.weight",
        "model.recurrent.blocks.0.attention.q_proj.weight",
        "model.recurrent.blocks.0.attention.k_proj.weight",
        "model.recurrent.blocks.0.attention.v_proj.weight",
        "model.recurrent.blocks.0.attention.o_proj.weight",
        "model.recurrent.blocks.0.feed_forward_norm.weight",
        "model.recurrent.blocks.0.feed_forward.gate_proj.weight",
        "model.recurrent.blocks.0.feed_forward.up_proj.weight",
        "model.recurrent.blocks.0.feed_forward.down_proj.weight",
        "model.coda.blocks.0.attention_norm.weight",
        "model.coda.blocks.0.attention.q_proj.weight",
        "model.coda.blocks.0.attention.k_proj.weight",
        "model.coda.blocks.0.attention.v_proj.weight",
        "model.coda.blocks.0.attention.o_proj.weight",
        "model.coda.blocks.0.feed_forward_norm.weight",
        "model.coda.blocks.0.feed_forward.gate_proj.weight",
        "model.coda.blocks.0.feed_forward.up_proj.weight",
        "model.coda.blocks.0.feed_forward.down_proj.weight",
        "model.final_norm.weight",
        "lm_head.weight",
    ]


def test_names_of_every_option_are_frozen() -> None:
    model = tiny_model(
        tiny_config(
            num_prelude_blocks=0,
            num_coda_blocks=0,
            num_recurrent_blocks=1,
            attention_bias=True,
            mlp_bias=True,
            lm_head_bias=True,
            tie_word_embeddings=False,
            norm_type="layernorm",
            final_norm="layernorm",
            recurrent_residual_mode="learned_vector",
            gate_loop_embedding=True,
            input_injection="attention_memory",
            recurrent_norm="sandwich",
        )
    )
    assert sorted(model.state_dict()) == sorted(
        [
            "lm_head.bias",
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.final_norm.bias",
            "model.final_norm.weight",
            "model.recurrent.blocks.0.attention.k_proj.bias",
            "model.recurrent.blocks.0.attention.k_proj.weight",
            "model.recurrent.blocks.0.attention.memory_k_proj.bias",
            "model.recurrent.blocks.0.attention.memory_k_proj.weight",
            "model.recurrent.blocks.0.attention.memory_v_proj.bias",
            "model.recurrent.blocks.0.attention.memory_v_proj.weight",
            "model.recurrent.blocks.0.attention.o_proj.bias",
            "model.recurrent.blocks.0.attention.o_proj.weight",
            "model.recurrent.blocks.0.attention.q_proj.bias",
            "model.recurrent.blocks.0.attention.q_proj.weight",
            "model.recurrent.blocks.0.attention.v_proj.bias",
            "model.recurrent.blocks.0.attention.v_proj.weight",
            "model.recurrent.blocks.0.attention_norm.bias",
            "model.recurrent.blocks.0.attention_norm.weight",
            "model.recurrent.blocks.0.attention_residual_scale",
            "model.recurrent.blocks.0.feed_forward.down_proj.bias",
            "model.recurrent.blocks.0.feed_forward.down_proj.weight",
            "model.recurrent.blocks.0.feed_forward.gate_proj.bias",
            "model.recurrent.blocks.0.feed_forward.gate_proj.weight",
            "model.recurrent.blocks.0.feed_forward.up_proj.bias",
            "model.recurrent.blocks.0.feed_forward.up_proj.weight",
            "model.recurrent.blocks.0.feed_forward_norm.bias",
            "model.recurrent.blocks.0.feed_forward_norm.weight",
            "model.recurrent.blocks.0.feed_forward_residual_scale",
            "model.recurrent.blocks.0.post_attention_norm.bias",
            "model.recurrent.blocks.0.post_attention_norm.weight",
            "model.recurrent.blocks.0.post_feed_forward_norm.bias",
            "model.recurrent.blocks.0.post_feed_forward_norm.weight",
            "model.recurrent.closing_norm.bias",
            "model.recurrent.closing_norm.weight",
            "model.recurrent.gate.loop_proj.weight",
            "model.recurrent.gate.norm.bias",
            "model.recurrent.gate.norm.weight",
            "model.recurrent.gate.proj.bias",
            "model.recurrent.gate.proj.weight",
            "model.recurrent.memory_norm.bias",
            "model.recurrent.memory_norm.weight",
        ]
    )


@pytest.mark.parametrize(
    "overrides, added",
    [
        ({"input_injection": "residual"}, {"model.recurrent.injection_proj.weight"}),
        ({"input_injection": "residual", "injection_projection": "identity"}, set()),
        ({"input_injection": "concat_project"}, {"model.recurrent.injection_proj.weight"}),
        ({"input_injection": "gate_condition"}, {"model.recurrent.gate.condition_proj.weight"}),
    ],
    ids=["residual", "identity", "concat_project", "gate_condition"],
)
def test_names_of_the_other_injections_are_frozen(overrides: dict[str, Any], added: set[str]) -> None:
    plain = set(tiny_model(tiny_config(input_injection="none")).state_dict())
    assert set(tiny_model(tiny_config(**overrides)).state_dict()) - plain == added


def test_no_optional_embedding_exists_by_default() -> None:
    names = " ".join(tiny_model().state_dict())
    assert names.count("embed") == 1 and "position" not in names and "token_type" not in names


def test_parameters_do_not_depend_on_the_number_of_loops() -> None:
    model, ids = tiny_model(), random_ids()
    keys, count = list(model.state_dict()), model.num_parameters()
    for loops in (1, 4, 9):
        model(ids, num_loops=loops, allow_extrapolation=True)
        assert list(model.state_dict()) == keys and model.num_parameters() == count
    other = CognexisForCausalLM(tiny_config(trained_max_loops=64, kv_slots=7))
    assert list(other.state_dict()) == keys and other.num_parameters() == count


# -- the shared core against one copy per loop ------------------------------------------------------------------------


class Unrolled(nn.Module):
    """The same model with a copy of the whole core for each loop; reads the stages' modules, shares nothing."""

    def __init__(self, model: CognexisForCausalLM, loops: int) -> None:
        super().__init__()
        twin = copy.deepcopy(model)
        self.body, self.head = twin.model, twin.lm_head
        self.copies = nn.ModuleList(copy.deepcopy(twin.model.recurrent) for _ in range(loops))

    def loss(self, ids: Tensor) -> Tensor:
        x = self.body.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        turn = self.body.rotary_emb(x, positions)
        for block in self.body.prelude.blocks:
            x = block(x, turn, causal)
        h0 = x
        for loop_index, core in enumerate(self.copies):
            memories = core.memories(h0, turn, None)
            masks = causal if core.memory_norm is None else torch.cat((causal, causal), dim=-1)
            x, _ = core.loop(
                x, h0, loop_index, {"full_attention": masks}, memories, position_embeddings=turn, past_key_values=None
            )
        for block in self.body.coda.blocks:
            x = block(x, turn, causal)
        logits = self.head(self.body.final_norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def summed_gradients(self) -> dict[str, Tensor]:
        """Gradients under the names of the looped model; the core's are summed over its copies."""
        found = {f"model.{name}": p.grad for name, p in self.body.named_parameters() if "recurrent" not in name}
        for copied in self.copies:
            for name, parameter in copied.named_parameters():
                key = f"model.recurrent.{name}"
                found[key] = found.get(key, 0) + parameter.grad
        return found


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "plain": None,
    **{
        f"{'reentrant' if reentrant else 'saved'} every {k}": {"use_reentrant": reentrant, "every_k_loops": k}
        for reentrant in (False, True)
        for k in (1, 2, 3)
    },
}


@pytest.mark.parametrize("loops", ["int", "tensor", "default"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_shared_gradient_is_the_sum_over_a_copy_per_loop(checkpointing: str, autocast: bool, loops: str) -> None:
    model = tiny_model(tiny_config(default_loops=3)).train()
    unrolled = Unrolled(model, 3)
    if (options := CHECKPOINTING[checkpointing]) is not None:
        model.gradient_checkpointing_enable(dict(options))
    ids = random_ids()
    given = {"int": {"num_loops": 3}, "tensor": {"num_loops": torch.tensor(3)}, "default": {}}[loops]
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(ids, labels=ids, **given).loss
        expected_loss = unrolled.loss(ids)
    loss.backward()
    expected_loss.backward()
    # float32: three gradients summed in another order. Autocast: the shared weight is cast once, so its three
    # gradients meet in bfloat16 (2^-8 each) before they return to float32.
    tolerance = 2e-2 if autocast else 1e-5
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    expected = unrolled.summed_gradients()
    assert gradients(model).keys() == expected.keys()
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, expected[name]) < tolerance, name


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("loops", [1, 4])
def test_shared_gradient_is_exact_in_float64_for_every_injection(injection: str, loops: int) -> None:
    model = tiny_model(tiny_config(input_injection=injection, gate_loop_embedding=True)).double().train()
    unrolled, ids = Unrolled(model, loops), random_ids()
    model(ids, labels=ids, num_loops=loops).loss.backward()
    unrolled.loss(ids).backward()
    for name, gradient in unrolled.summed_gradients().items():
        # Sums in another order, carried through four loops.
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("checkpointing", [name for name in CHECKPOINTING if name != "plain"])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_recomputation_leaves_the_gradients_as_they_are(injection: str, checkpointing: str) -> None:
    results = []
    for options in (None, CHECKPOINTING[checkpointing]):
        model = tiny_model(tiny_config(input_injection=injection, ffn_dropout=0.2)).train()
        if options is not None:
            model.gradient_checkpointing_enable(dict(options))
        ids = torch.arange(12).view(2, 6)
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        if checkpointing.startswith("saved"):
            assert torch.equal(results[1][name], gradient), name
        else:  # reentrant segments hand back the gradient of h_0 one by one: float32 sums in another order
            assert relative_error(results[1][name], gradient) < 1e-6, name


@pytest.mark.parametrize("every, segments", [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_loops_between_two_kept_states_form_one_segment(every: int, segments: int) -> None:
    model, ids, calls = tiny_model().train(), random_ids(), []
    model.gradient_checkpointing_enable({"every_k_loops": every})
    core = model.model.recurrent
    inner = core._gradient_checkpointing_func
    core._gradient_checkpointing_func = lambda *args: calls.append(1) or inner(*args)
    model(ids, labels=ids).loss.backward()
    assert len(calls) == segments


def test_segment_of_recomputed_loops_must_be_a_positive_integer() -> None:
    for bad in (0, -1, 1.5, "2", True):
        with pytest.raises(InvalidConfigError, match="every_k_loops"):
            tiny_model().gradient_checkpointing_enable({"every_k_loops": bad})


# -- one loop is Llama ------------------------------------------------------------------------------------------------

LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    **{f"attention.{name}": f"self_attn.{name}" for name in ATTENTION},
    **{f"feed_forward.{name}": f"mlp.{name}" for name in FEED_FORWARD},
}


def llama_name(name: str) -> str:
    """Our parameter's name in a Llama of 2 prelude, 1 core and 1 coda block, one after the other."""
    name = name.replace("final_norm", "norm")
    for stage, first in (("prelude", 0), ("recurrent", 2), ("coda", 3)):
        if name.startswith(f"model.{stage}.blocks."):
            index, part = name.removeprefix(f"model.{stage}.blocks.").split(".", 1)
            part, kind = part.rsplit(".", 1)
            return f"model.layers.{first + int(index)}.{LLAMA_NAMES[part]}.{kind}"
    return name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_one_loop_without_extras_equals_llama(backend: str, bias: bool) -> None:
    config = tiny_config(
        recurrent_gating=False,
        input_injection="none",
        recurrent_norm="none",
        recurrent_residual_mode="fixed",
        recurrent_residual_scale=1.0,
        attention_bias=bias,
        mlp_bias=bias,
        default_loops=1,
    )
    ours = tiny_model(config)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            attention_bias=bias,
            mlp_bias=bias,
        )
    ).eval()
    weights = {llama_name(name): tensor for name, tensor in ours.state_dict().items()}
    assert llama.load_state_dict(weights, strict=True)
    ours.set_attn_implementation(backend)
    llama.set_attn_implementation(backend)
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # would be predicted from padding, where Llama's eager attention averages over hidden keys
    got, expected = (m(ids, attention_mask=mask, labels=labels) for m in (ours, llama))
    # Llama takes the norms and angles by other float32 operations; logits are of unit scale.
    real = mask.bool()
    torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    got.loss.backward()
    expected.loss.backward()
    theirs = gradients(llama)
    for name, gradient in gradients(ours).items():
        assert relative_error(gradient, theirs[llama_name(name)]) < 1e-5, name


# -- long runs and non-finite states ----------------------------------------------------------------------------------


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("style", ["sample", "training preset"])
def test_fresh_model_stays_finite_up_to_four_times_the_trained_loops(style: str, injection: str) -> None:
    settings: dict[str, Any] = {"injection_scale": 0.1, "recurrent_norm": "none", "input_injection": injection}
    if style == "training preset" and injection != "gate_condition":
        settings |= {"recurrent_gating": False, "recurrent_norm": "sandwich", "injection_scale": 1.0}
        settings |= {"recurrent_residual_mode": "fixed", "recurrent_residual_scale": 1.0}
    model, ids = CognexisForCausalLM(tiny_config(trained_max_loops=16, **settings)).eval(), random_ids()
    for loops in (1, 2, 4, 8, 16, 32, 64):
        out = model(ids, num_loops=loops, allow_extrapolation=True, return_loop_stats=True)
        diagnostics = out.loop_diagnostics
        assert out.logits.isfinite().all()
        assert diagnostics.extrapolated == (loops > 16)
        assert diagnostics.norms.shape == (loops + 1,) and diagnostics.norms.isfinite().all()
        assert bool(diagnostics.is_finite.all())


def test_more_loops_than_allowed_need_a_word() -> None:
    with pytest.raises(InvalidConfigError, match="allow_extrapolation=True"):
        tiny_model()(random_ids(), num_loops=5)


def break_loop(model: CognexisForCausalLM, loop: int, value: float) -> None:
    """Let the state after ``loop`` hold ``value`` in one place."""
    calls = itertools.count(1)

    def hook(_: nn.Module, __: Any, state: Tensor) -> Tensor:
        if next(calls) != loop:
            return state
        broken = state.clone()
        broken[0, 0, 0] = value
        return broken

    model.model.recurrent.loop_state.register_forward_hook(hook)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("checkpointing", ["plain", "saved every 1", "saved every 3", "reentrant every 2"])
def test_non_finite_state_in_training_names_its_loop(checkpointing: str, value: float) -> None:
    model = tiny_model().train()
    if (options := CHECKPOINTING[checkpointing]) is not None:
        model.gradient_checkpointing_enable(dict(options))
    break_loop(model, 2, value)
    ids = random_ids()
    with pytest.raises(NonFiniteError, match=r"after loop 2 \(of 4 loops\)"):
        model(ids, labels=ids)


def test_non_finite_input_of_the_core_and_non_finite_loss_are_told_apart() -> None:
    model, ids = tiny_model().train(), random_ids()
    with pytest.raises(NonFiniteError, match="entering the recurrent core"):
        model(inputs_embeds=torch.full((1, 3, 32), float("nan")))
    with torch.no_grad():
        model.model.final_norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="loss: nan after 4 loops"):
        model(ids, labels=ids)


def test_non_finite_state_in_evaluation_is_reported_and_not_raised() -> None:
    model = tiny_model()
    break_loop(model, 2, float("nan"))
    out = model(random_ids(), return_loop_stats=True)
    assert out.loop_diagnostics.is_finite.tolist() == [True, True, False, False, False]


def test_overflow_of_float16_in_the_loops_is_detected() -> None:
    config = tiny_config(
        recurrent_gating=False, recurrent_norm="none", recurrent_residual_mode="fixed", recurrent_residual_scale=8e3
    )
    model, ids = tiny_model(config), random_ids()
    assert model.train()(ids).logits.isfinite().all(), "float32 holds it"
    half = tiny_model(config).half()
    with pytest.raises(NonFiniteError, match=r"after loop \d \(of 4 loops\)"):
        half.train()(ids)
    flags = half.eval()(ids, return_loop_stats=True).loop_diagnostics.is_finite.tolist()
    assert flags[0] and not flags[-1]


# -- without storage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_forward_on_the_meta_device_gives_the_shapes(training: bool) -> None:
    with torch.device("meta"):
        model = CognexisForCausalLM(tiny_config()).train(training)
        ids = torch.zeros(2, 6, dtype=torch.long)
    out = model(ids, labels=ids)
    assert out.logits.shape == (2, 6, 64) and out.logits.is_meta and out.loss.shape == ()


# -- float64 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("injection", INJECTIONS)
def test_float64_is_kept_from_embedding_to_logits(injection: str) -> None:
    """A step through float32 anywhere would make the numeric gradient meaningless at this step width."""
    model = tiny_model(tiny_config(input_injection=injection, norm_type="layernorm", final_norm="rmsnorm")).double()
    embeds = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    assert model(inputs_embeds=embeds).logits.dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda x: model(inputs_embeds=x, num_loops=2).logits, (embeds,), fast_mode=True, eps=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("dtype, step", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_model_stays_near_float32_at_all_loops(dtype: torch.dtype, step: float) -> None:
    model, ids = tiny_model(), random_ids()
    exact = model(ids).logits
    half = copy.deepcopy(model).to(dtype)
    logits = half(ids).logits
    assert logits.dtype == dtype
    cosine = nn.functional.cosine_similarity(logits.float().flatten(), exact.flatten(), dim=0).item()
    # About thirty roundings on the way, each a relative ``step``: an angle of 30 steps at most.
    assert cosine > 1 - (30 * step) ** 2 / 2


# -- task heads -------------------------------------------------------------------------------------------------------


def padded(ids: Tensor, side: str, width: int = 3) -> dict[str, Tensor]:
    """``ids`` with padding on one side, and the mask."""
    amount = (width, 0) if side == "left" else (0, width)
    return {
        "input_ids": nn.functional.pad(ids, amount, value=2),
        "attention_mask": nn.functional.pad(torch.ones_like(ids), amount),
    }


@pytest.mark.parametrize("injection", ["residual", "attention_memory"])
def test_sequence_label_is_read_at_the_last_real_token_on_either_side(injection: str) -> None:
    config = tiny_config(num_labels=3, input_injection=injection)
    model, ids = tiny_model(config, cls=CognexisForSequenceClassification).double(), random_ids()
    exact = model(ids).logits
    assert exact.shape == (2, 3)
    last = model.score(model.model(ids).last_hidden_state[:, -1])
    torch.testing.assert_close(exact, last, rtol=0, atol=1e-13)  # the product over all rows is summed differently
    for side in ("left", "right"):
        logits = model(**padded(ids, side)).logits
        torch.testing.assert_close(logits, exact, rtol=FLOAT64_NOISE, atol=FLOAT64_NOISE)
    by_pad_id = model(padded(ids, "right")["input_ids"]).logits
    torch.testing.assert_close(by_pad_id, exact, rtol=FLOAT64_NOISE, atol=FLOAT64_NOISE)
    mixed = {key: torch.cat((padded(ids, "left")[key], padded(ids, "right")[key])) for key in padded(ids, "left")}
    both = model(**mixed).logits
    torch.testing.assert_close(both, exact.repeat(2, 1), rtol=FLOAT64_NOISE, atol=FLOAT64_NOISE)
    embeds = model.model.embed_tokens(padded(ids, "right")["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=padded(ids, "right")["attention_mask"]).logits
    torch.testing.assert_close(by_embeds, exact, rtol=FLOAT64_NOISE, atol=FLOAT64_NOISE)


def test_sequence_label_without_mask_needs_a_padding_id_for_several_rows() -> None:
    model = tiny_model(tiny_config(pad_token_id=None), cls=CognexisForSequenceClassification)
    assert model(random_ids(1)).logits.shape == (1, 2)
    with pytest.raises(InvalidConfigError, match="pad_token_id"):
        model(random_ids(2))


@pytest.mark.parametrize(
    "num_labels, labels, expected",
    [
        (3, torch.tensor([2, 0]), nn.functional.cross_entropy),
        (1, torch.tensor([0.5, -1.0]), lambda logits, y: ((logits[:, 0] - y) ** 2).mean()),
        (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), nn.functional.binary_cross_entropy_with_logits),
    ],
    ids=["classes", "regression", "several labels"],
)
def test_sequence_loss_follows_the_kind_of_labels(num_labels: int, labels: Tensor, expected: Any) -> None:
    model = tiny_model(tiny_config(num_labels=num_labels), cls=CognexisForSequenceClassification)
    out = model(random_ids(), labels=labels)
    torch.testing.assert_close(out.loss, expected(out.logits, labels), rtol=1e-6, atol=0)  # float32
    out.loss.backward()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients(model).values())


def test_token_labels_are_read_at_every_token() -> None:
    config = tiny_config(num_labels=3, classifier_dropout=0.5)
    model, ids = tiny_model(config, cls=CognexisForTokenClassification), random_ids()
    labels = torch.randint(0, 3, (2, 6))
    labels[0, :2] = -100
    out = model(ids, labels=labels)
    assert torch.equal(out.logits, model.score(model.model(ids).last_hidden_state))
    expected = nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)  # float32
    assert not torch.equal(model.train()(ids).logits, out.logits), "the classifier's dropout"
    for side, kept in (("left", slice(3, None)), ("right", slice(6))):
        logits = model.eval().double()(**padded(ids, side)).logits[:, kept]
        exact = model(ids).logits
        torch.testing.assert_close(logits, exact, rtol=FLOAT64_NOISE, atol=FLOAT64_NOISE)


def test_answer_span_has_start_and_end_logits_and_their_loss() -> None:
    model, ids = tiny_model(cls=CognexisForQuestionAnswering), random_ids()
    start, end = torch.tensor([0, 4]), torch.tensor([3, 5])
    out = model(ids, start_positions=start, end_positions=end)
    both = model.qa_outputs(model.model(ids).last_hidden_state)
    assert torch.equal(torch.stack((out.start_logits, out.end_logits), -1), both)
    loss = nn.functional.cross_entropy
    expected = (loss(out.start_logits, start) + loss(out.end_logits, end)) / 2
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)  # float32
    assert model(ids).loss is None


HEADS = [CognexisForSequenceClassification, CognexisForTokenClassification, CognexisForQuestionAnswering]


@pytest.mark.parametrize("head", HEADS)
def test_task_head_runs_the_loops_it_is_told_and_refuses_misspelt_ones(head: Any) -> None:
    model, ids = tiny_model(cls=head), random_ids()
    name = "start_logits" if head is CognexisForQuestionAnswering else "logits"
    one, four = (getattr(model(ids, num_loops=n), name) for n in (1, 4))
    assert not torch.allclose(one, four, atol=1e-3)
    assert torch.equal(getattr(model(ids), name), four)
    with pytest.raises(InvalidConfigError, match="num_loops"):
        model(ids, num_loops=5)
    with pytest.raises(InvalidConfigError, match="'num_loop'.*'num_loops'"):
        model(ids, num_loop=2)


@pytest.mark.parametrize("head", HEADS)
def test_task_head_takes_over_the_body_of_a_language_model(head: Any, tmp_path: Path) -> None:
    source = tiny_model()
    source.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path).eval()
    ids = random_ids()
    assert isinstance(loaded.model, CognexisModel)
    assert torch.equal(loaded.model(ids).last_hidden_state, source.model(ids).last_hidden_state)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_loop", "loops", "max_loop", "nun_loops", "loop_budgets", "allow_extrapolate"])
@pytest.mark.parametrize("part", ["language model", "body"])
def test_misspelt_loop_argument_is_refused(part: str, name: str) -> None:
    model = tiny_model() if part == "language model" else tiny_model().model
    with pytest.raises(InvalidConfigError, match=f"unknown argument '{name}'") as caught:
        model(random_ids(), **{name: 2})
    assert caught.value.path == name


def test_arguments_of_attention_backends_still_pass() -> None:
    model, ids = tiny_model(), random_ids()
    assert torch.equal(model(ids, output_attentions=False, cache_position=None).logits, model(ids).logits)


@pytest.mark.parametrize("label", [64, -1])
def test_label_outside_the_vocabulary_is_refused(label: int) -> None:
    ids = random_ids()
    labels = ids.clone()
    labels[1, 3] = label
    with pytest.raises(InvalidTokenIdError, match=f"labels: id {label}"):
        tiny_model()(ids, labels=labels)


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (12,)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatchError, match="labels"):
        tiny_model()(random_ids(), labels=torch.zeros(shape, dtype=torch.long))


def test_batch_without_a_target_trains_to_a_zero_gradient() -> None:
    model, ids = tiny_model().train(), random_ids()
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert {gradient.abs().max().item() for gradient in gradients(model).values()} == {0.0}


def test_loss_mask_reaches_the_loss() -> None:
    model, ids = tiny_model(), random_ids()
    mask = torch.ones(2, 6)
    mask[:, :4] = 0
    weighted = model(ids, labels=ids, loss_mask=mask).loss
    cut = model(ids, labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(weighted, cut, rtol=1e-6, atol=0)  # float32 sums in another order


def test_a_configuration_may_ask_for_tuples():
    ids = torch.arange(6)[None]
    model = tiny_model(tiny_config(return_dict=False))
    output = model(ids)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], tiny_model()(ids).logits)
