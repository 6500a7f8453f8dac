"""What transformers and its users expect of every causal language model, applied to Cognexis.

A battery in the spirit of the library's own common model tests: saving and loading, initialisation, tied weights,
outputs, attention implementations, activation checkpointing, precision, placement, compilation.
"""

import copy
import inspect
import json
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

from cognexis import (
    CognexisCache,
    CognexisConfig,
    CognexisForCausalLM,
    CognexisForQuestionAnswering,
    CognexisForSequenceClassification,
    CognexisForTokenClassification,
    CognexisModel,
)
from cognexis.errors import InvalidConfigError
from tests.batteries.state_layers import overrides
from tests.batteries.tiny import tiny_config, tiny_model

CLASSES = [
    CognexisModel,
    CognexisForCausalLM,
    CognexisForSequenceClassification,
    CognexisForTokenClassification,
    CognexisForQuestionAnswering,
]
HEADS = CLASSES[1:]
# Together these have every kind of parameter that the model knows.
VARIANTS: dict[str, dict[str, Any]] = {
    "gated": {},
    "learned scale, concatenation": {
        "recurrent_residual_mode": "learned_vector",
        "recurrent_gating": False,
        "input_injection": "concat_project",
        "recurrent_norm": "closing",
    },
    "conditioned gate, layer norm, biases": {
        "input_injection": "gate_condition",
        "gate_loop_embedding": True,
        "gate_init_bias": -2.0,
        "norm_type": "layernorm",
        "final_norm": "layernorm",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "attention memory": {"input_injection": "attention_memory", "recurrent_residual_mode": "learned_scalar"},
    "untied, two core blocks": {
        "tie_word_embeddings": False,
        "lm_head_bias": True,
        "ffn_activation": "gelu",
        "num_recurrent_blocks": 2,
        "experimental_multi_block": True,
        "injection_site": "post",
    },
}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
    },
}


def name_of(value: Any) -> str | None:
    return value.__name__ if isinstance(value, type) else None


def token_ids(rows: int = 2, length: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def targets(cls: type, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels for one of the heads."""
    rows = torch.arange(ids.shape[0])
    return {
        CognexisForCausalLM: {"labels": ids},
        CognexisForSequenceClassification: {"labels": rows % 3},
        CognexisForTokenClassification: {"labels": ids % 3},
        CognexisForQuestionAnswering: {"start_positions": rows, "end_positions": rows + 2},
    }.get(cls, {})


def run(model: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def assert_same_outputs(left: Any, right: Any) -> None:
    assert len(tensors(left)) == len(tensors(right)) > 0
    for a, b in zip(tensors(left), tensors(right), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_same_weights(left: Any, right: Any) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert list(a) == list(b)
    assert [key for key in a if not torch.equal(a[key], b[key]) or a[key].dtype != b[key].dtype] == []


# ---- saving and loading ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_reloaded_model_is_bit_equal(tmp_path, cls, dtype):
    model = tiny_model(tiny_config(num_labels=3), cls=cls).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: value for key, value in report.items() if value} == {}
    assert loaded.dtype == dtype and not loaded.training
    assert_same_weights(loaded, model)
    assert_same_outputs(run(loaded, token_ids()), run(model, token_ids()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_reloads_bit_equal(tmp_path, variant):
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    model.save_pretrained(tmp_path)
    loaded = CognexisForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert_same_outputs(run(loaded, token_ids(), num_loops=3), run(model, token_ids(), num_loops=3))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("cls", [CognexisModel, CognexisForCausalLM], ids=name_of)
def test_sharded_save_reloads_bit_equal(tmp_path, cls):
    model = tiny_model(cls=cls)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    loaded = cls.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert_same_outputs(run(loaded, token_ids()), run(model, token_ids()))


def test_state_dict_loads_strictly_through_torch_save(tmp_path):
    model = tiny_model()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = CognexisForCausalLM(tiny_config()).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert_same_outputs(run(other, token_ids()), run(model, token_ids()))


@pytest.mark.parametrize("cls", HEADS, ids=name_of)
def test_checkpoint_of_a_head_loads_as_body_and_back(tmp_path, cls):
    model = tiny_model(tiny_config(num_labels=3), cls=cls)
    model.save_pretrained(tmp_path / "head")
    body, report = CognexisModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not report["missing_keys"]
    assert_same_weights(body, model.model)
    body.save_pretrained(tmp_path / "body")
    again, report = cls.from_pretrained(tmp_path / "body", output_loading_info=True)
    own = {key for key in model.state_dict() if not key.startswith("model.")}
    assert set(report["missing_keys"]) == (set() if cls is CognexisForCausalLM else own)
    assert not report["unexpected_keys"]
    assert_same_weights(again.model, model.model)
    if cls is CognexisForCausalLM:  # the head is the embedding, so nothing was lost
        assert_same_outputs(run(again, token_ids()), run(model, token_ids()))
    assert all(torch.isfinite(tensor).all() for tensor in tensors(run(again, token_ids())))


def test_generation_config_survives_saving(tmp_path):
    model = tiny_model()
    model.generation_config.update(temperature=0.7, do_sample=True)
    model.generation_config.num_loops = 3
    model.save_pretrained(tmp_path)
    loaded = CognexisForCausalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.temperature, loaded.do_sample, loaded.num_loops) == (0.7, True, 3)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)


def test_loading_a_complete_checkpoint_draws_no_random_number(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    CognexisForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_mismatched_sizes_are_an_error_unless_ignored(tmp_path):
    tiny_model(tiny_config(num_labels=3), cls=CognexisForTokenClassification).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        CognexisForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    model = CognexisForTokenClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.score.weight.shape == (5, 32)
    assert torch.isfinite(run(model, token_ids()).logits).all()


# ---- what a checkpoint lacks is initialised ----


def kinds_of_keys(model: Any) -> dict[str, str]:
    """One key of each kind: blocks of a stage have the same parameters."""
    kinds = {re.sub(r"blocks\.\d+", "blocks", key): key for key in reversed(list(model.state_dict()))}
    if model.config.tie_word_embeddings:
        del kinds["lm_head.weight"]
    return kinds


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_missing_parameter_is_initialised_as_in_a_new_model(tmp_path, variant):
    config = tiny_config(**VARIANTS[variant])
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    fresh, other = (CognexisForCausalLM(config).state_dict() for _ in range(2))
    kinds = kinds_of_keys(model)
    if variant != "gated":  # what the first variant has, too, is looked at there
        usual = kinds_of_keys(tiny_model())
        kinds = {kind: key for kind, key in kinds.items() if kind not in usual or kind == "model.final_norm.weight"}
    for key in kinds.values():
        save_file({k: v for k, v in saved.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
        loaded, report = CognexisForCausalLM.from_pretrained(tmp_path, verify="off", output_loading_info=True)
        ties = {key, "lm_head.weight"} if key == "model.embed_tokens.weight" and config.tie_word_embeddings else {key}
        assert set(report["missing_keys"]) == ties
        assert not [name for name, tensor in loaded.named_parameters() if tensor.is_meta]
        state = loaded.state_dict()
        changed = [k for k in saved if k not in ties and not torch.equal(state[k], saved[k])]
        assert changed == [], f"without {key}, other parameters were drawn again"
        if torch.equal(fresh[key], other[key]):
            torch.testing.assert_close(state[key], fresh[key], rtol=0, atol=0, msg=f"{key} is not what it starts as")
        else:
            assert torch.isfinite(state[key]).all(), f"{key} was left uninitialised"
            error = 4 / state[key].numel() ** 0.5
            assert abs(state[key].std() / config.initializer_range - 1) < error, f"{key}: std {state[key].std()}"
            assert abs(state[key].mean() / config.initializer_range) < error, f"{key}: mean {state[key].mean()}"
        if config.tie_word_embeddings:
            assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_checkpoint_without_any_known_key_gives_a_new_model(tmp_path, cls):
    config = tiny_config(num_labels=3)
    tiny_model(config, cls=cls).save_pretrained(tmp_path)
    save_file({"stranger": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = cls.from_pretrained(tmp_path, verify="off")
    for key, value in cls(config).state_dict().items():
        got = loaded.state_dict()[key]
        assert torch.isfinite(got).all() and got.device.type == "cpu", key
        torch.testing.assert_close(got.std(correction=0), value.std(correction=0), rtol=0.5, atol=1e-6, msg=key)


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_frequencies_come_back_exactly(tmp_path, rope, dtype):
    model = CognexisForCausalLM(tiny_config(rope_parameters=ROPE[rope])).eval()
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "freq" in key]
    loaded = CognexisForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = dict(model.named_buffers())
    assert set(dict(loaded.named_buffers())) == set(expected)
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0)
    assert loaded.model.rotary_emb.attention_scaling == model.model.rotary_emb.attention_scaling


def test_new_models_follow_the_seed_and_the_configured_spread():
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(CognexisForCausalLM(tiny_config(initializer_range=0.5)))
    assert_same_weights(*models)
    for name, parameter in models[0].named_parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std() / 0.5 - 1) < 0.15, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)), name


# ---- tied weights and the vocabulary ----


def is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return head is embedding and head.data_ptr() == embedding.data_ptr()


def test_head_and_embedding_stay_one_parameter(tmp_path):
    model = tiny_model()
    assert is_tied(model)
    names = [name for name, _ in model.named_parameters()]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert is_tied(model.to(torch.bfloat16).to(torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert len({id(p) for group in optimizer.param_groups for p in group["params"]}) == len(names)
    before = model.lm_head.weight.clone()
    model(token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    assert is_tied(model) and not torch.equal(model.lm_head.weight, before)
    model.save_pretrained(tmp_path)
    assert is_tied(CognexisForCausalLM.from_pretrained(tmp_path))
    assert is_tied(CognexisForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert is_tied(copy.deepcopy(model))
    model.resize_token_embeddings(70)
    assert is_tied(model)


def test_tied_weight_is_one_tensor_on_disk(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sorted({"lm_head.weight", "model.embed_tokens.weight"} & set(saved)) == ["model.embed_tokens.weight"]
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in model.parameters())


def test_untied_head_is_a_second_tensor(tmp_path):
    model = tiny_model(tiny_config(tie_word_embeddings=False))
    assert not is_tied(model)
    model.save_pretrained(tmp_path)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(load_file(tmp_path / "model.safetensors"))
    loaded = CognexisForCausalLM.from_pretrained(tmp_path)
    assert not is_tied(loaded)
    assert_same_weights(loaded, model)


def test_core_is_stored_once_whatever_the_loop_counts(tmp_path):
    sizes = []
    for loops in (1, 16):
        model = CognexisForCausalLM(tiny_config(trained_max_loops=loops))
        model.save_pretrained(tmp_path / str(loops))
        sizes.append((tmp_path / str(loops) / "model.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": False, "lm_head_bias": True}], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [70, 40])
def test_resized_vocabulary_keeps_the_old_rows(tmp_path, variant, size):
    model = tiny_model(tiny_config(**variant))
    old = {key: value.clone() for key, value in model.state_dict().items()}
    ids = token_ids() % 36
    logits = run(model, ids).logits
    model.resize_token_embeddings(size)
    kept = min(size, 64)
    assert model.config.vocab_size == model.vocab_size == size
    for key in ("model.embed_tokens.weight", "lm_head.weight", *(["lm_head.bias"] if variant else [])):
        assert model.state_dict()[key].shape[0] == size
        torch.testing.assert_close(model.state_dict()[key][:kept], old[key][:kept], rtol=0, atol=0)
    output = run(model, ids, labels=ids)
    torch.testing.assert_close(output.logits[..., :kept], logits[..., :kept])
    assert torch.isfinite(output.logits).all() and torch.isfinite(output.loss)
    if size > 64:
        model.generate(torch.full((1, 3), size - 1), max_new_tokens=3)
    model.save_pretrained(tmp_path)
    assert_same_weights(CognexisForCausalLM.from_pretrained(tmp_path), model)


def test_resize_pads_to_a_multiple():
    model = tiny_model()
    model.resize_token_embeddings(65, pad_to_multiple_of=32)
    assert model.config.vocab_size == model.lm_head.out_features == 96


def test_embeddings_can_be_read_and_replaced():
    model = tiny_model()
    assert model.base_model is model.get_decoder() is model.model
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    new = torch.nn.Embedding(64, 32)
    model.set_input_embeddings(new)
    assert model.model.embed_tokens is new
    head = torch.nn.Linear(32, 64, bias=False)
    model.set_output_embeddings(head)
    assert model.lm_head is head


# ---- inputs ----


@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_first_arguments_are_those_that_tools_expect(cls):
    names = list(inspect.signature(cls.forward).parameters)
    assert names[:2] == ["self", "input_ids"]
    # The Trainer hands on only the columns that a forward names, pipelines likewise.
    assert {"attention_mask", "position_ids", "inputs_embeds"} <= set(names)


@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_inputs_embeds_equal_input_ids(cls):
    model = tiny_model(tiny_config(num_labels=3, embedding_scale=2.0), cls=cls)
    ids = token_ids()
    embeds = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    expected = run(model, ids, attention_mask=mask, use_cache=False)
    assert_same_outputs(run(model, inputs_embeds=embeds, attention_mask=mask, use_cache=False), expected)


def test_generation_from_embeddings_equals_generation_from_ids():
    model = tiny_model()
    ids = token_ids()
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, num_loops=2)[:, ids.shape[1] :]
    embeds = model.get_input_embeddings()(ids)
    given = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False, num_loops=2)
    assert torch.equal(given, expected)


def test_four_dimensional_masks_are_taken_as_they_are():
    model = tiny_model()
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    allowed = mask[:, None, None, :].bool() & torch.ones(10, 10, dtype=torch.bool).tril()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = run(model, ids, attention_mask=mask).logits[mask.bool()]
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for given in (allowed, additive):
        logits = run(model, ids, attention_mask=given, position_ids=positions).logits[mask.bool()]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_rows_do_not_depend_on_their_batch(cls):
    model = tiny_model(tiny_config(num_labels=3), cls=cls)
    ids = token_ids(rows=3)
    together = tensors(run(model, ids, use_cache=False))[0]
    for row in range(3):
        alone = tensors(run(model, ids[row : row + 1], use_cache=False))[0]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_evaluation_is_repeatable_and_dropout_is_for_training():
    model = tiny_model(tiny_config(attention_dropout=0.3, ffn_dropout=0.3, embedding_dropout=0.3))
    assert_same_outputs(run(model, token_ids()), run(model, token_ids()))
    model.train()
    assert not torch.equal(run(model, token_ids()).logits, run(model, token_ids()).logits)


# ---- outputs ----


@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_tuple_output_is_the_dictionary_output_in_order(cls):
    model = tiny_model(tiny_config(num_labels=3), cls=cls).eval()
    arguments = {"input_ids": token_ids(), **targets(cls, token_ids()), "output_hidden_states": True}
    named = run(model, **arguments)
    plain = run(model, **arguments, return_dict=False)
    assert type(plain) is tuple and len(plain) == len(named.to_tuple())
    assert_same_outputs(plain, named)
    first = {CognexisModel: "last_hidden_state"}.get(cls, "loss")
    assert torch.equal(plain[0], named[first])


def test_configuration_can_ask_the_body_for_tuples():
    body = tiny_model(cls=CognexisModel)
    named = run(body, token_ids())
    body.config.return_dict = False
    plain = run(body, token_ids())
    assert type(plain) is tuple
    assert_same_outputs(plain, named)


@pytest.mark.parametrize("prelude", [2, 0])
@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("coda", [1, 0])
def test_hidden_states_are_embedding_blocks_and_loops(prelude, loops, coda):
    config = tiny_config(num_prelude_blocks=prelude, num_coda_blocks=coda, state_retention="all")
    model = tiny_model(config)
    output = run(model.model, token_ids(), num_loops=loops, output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == 1 + prelude + loops + coda
    torch.testing.assert_close(states[0], model.model.embed_tokens(token_ids()), rtol=0, atol=0)
    core = states[1 + prelude : 1 + prelude + loops]
    if coda:  # without one, the last entry is the state after the final norm
        assert_same_outputs(list(core), list(output.loop_states))
    assert_same_outputs(states[-1], output.last_hidden_state)
    assert all(state.shape == (2, 10, 32) for state in states)
    head = run(model, token_ids(), num_loops=loops, output_hidden_states=True)
    assert_same_outputs(head.hidden_states, states)
    assert run(model, token_ids()).hidden_states is None


def test_hidden_states_can_be_requested_by_the_configuration():
    model = tiny_model()
    model.config.output_hidden_states = True
    assert len(run(model, token_ids()).hidden_states) == 1 + 2 + 4 + 1


@pytest.mark.parametrize("blocks", [1, 2])
def test_attentions_are_one_per_block_and_loop(blocks):
    config = tiny_config(num_recurrent_blocks=blocks, experimental_multi_block=blocks > 1)
    model = tiny_model(config)
    model.set_attn_implementation("eager")
    attentions = run(model, token_ids(), num_loops=3, output_attentions=True).attentions
    assert len(attentions) == 2 + 3 * blocks + 1
    for weights in attentions:
        assert weights.shape == (2, 4, 10, 10)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 10))
        assert torch.equal(weights, weights.tril())
    assert len({weights.sum().item() + weights[0, 0, 5, 2].item() for weights in attentions}) == len(attentions)


def test_generate_returns_scores_states_and_attentions_of_each_step():
    model = tiny_model()
    model.set_attn_implementation("eager")
    output = model.generate(
        token_ids(),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        num_loops=2,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert [len(x) for x in (output.scores, output.logits, output.hidden_states, output.attentions)] == [3] * 4
    assert [len(x) for x in output.hidden_states] == [1 + 2 + 2 + 1] * 3
    assert [len(x) for x in output.attentions] == [2 + 2 + 1] * 3
    assert output.attentions[2][0].shape == (2, 4, 1, 12)


def test_gradients_can_be_kept_for_hidden_states_and_attentions():
    model = tiny_model()
    model.set_attn_implementation("eager")
    output = model(token_ids(), output_hidden_states=True, output_attentions=True)
    kept = [*output.hidden_states, *output.attentions]
    for tensor in kept:
        tensor.retain_grad()
    output.logits[:, -1].sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


@pytest.mark.parametrize("keep", [0, 1, 4, 10])
def test_logits_to_keep_counts_last_positions(keep):
    model = tiny_model()
    full = run(model, token_ids()).logits
    expected = full[:, -keep:] if keep else full
    torch.testing.assert_close(run(model, token_ids(), logits_to_keep=keep).logits, expected)


def test_logits_to_keep_takes_positions_and_masks():
    model = tiny_model()
    full = run(model, token_ids()).logits

    def kept(positions: torch.Tensor) -> torch.Tensor:
        return run(model, token_ids(), logits_to_keep=positions).logits

    torch.testing.assert_close(kept(torch.tensor([0, 3, 9])), full[:, [0, 3, 9]])
    rows = torch.tensor([[0, 5], [2, 9]])
    torch.testing.assert_close(kept(rows), torch.stack([full[0, rows[0]], full[1, rows[1]]]))
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 2], mask[1, 4], mask[1, 7] = True, True, True
    torch.testing.assert_close(kept(mask).reshape(-1, 64), full[mask])


@pytest.mark.parametrize("cls", HEADS, ids=name_of)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_receives_a_gradient(cls, variant):
    model = tiny_model(tiny_config(num_labels=3, **VARIANTS[variant]), cls=cls).train()
    ids = token_ids()
    model(ids, num_loops=3, **targets(cls, ids)).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, -1.0])),
        ("single_label_classification", 3, torch.tensor([2, 0])),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
    ],
)
def test_sequence_classification_knows_its_problem_types(problem, num_labels, labels):
    config = tiny_config(num_labels=num_labels, problem_type=problem)
    model = tiny_model(config, cls=CognexisForSequenceClassification)
    output = model(token_ids(), labels=labels)
    losses = {
        "regression": lambda x: torch.nn.functional.mse_loss(x.squeeze(), labels),
        "single_label_classification": lambda x: torch.nn.functional.cross_entropy(x, labels),
        "multi_label_classification": lambda x: torch.nn.functional.binary_cross_entropy_with_logits(x, labels),
    }
    torch.testing.assert_close(output.loss, losses[problem](output.logits))
    output.loss.backward()


# ---- attention implementations ----


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Flex attention as plain tensor operations, which needs no compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def attention_cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], torch.Tensor]]:
    """Configuration, inputs and the positions that count."""
    everything = torch.ones(2, 10, dtype=torch.bool)
    left, right, row = everything.clone(), everything.clone(), torch.ones(1, 10, dtype=torch.bool)
    left[0, :4], right[1, 7:] = False, False
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]])
    window = {
        "sliding_window": 3,
        "prelude_layer_types": ["sliding_attention", "full_attention"],
        "core_layer_types": ["sliding_attention"],
    }
    memory = {"input_injection": "attention_memory"}
    return {
        "plain": ({}, {}, everything),
        "left padding": ({}, {"attention_mask": left.long()}, left),
        "right padding": ({}, {"attention_mask": right.long()}, right),
        "documents by positions": ({}, {"position_ids": positions}, row),
        "documents by ids": ({}, {"document_ids": documents}, row),
        "documents by seq_idx": ({}, {"seq_idx": documents, "position_ids": positions}, row),
        "documents by lengths": (
            {},
            {"cu_seq_lens_q": torch.tensor([0, 3, 5, 10]), "position_ids": positions},
            row,
        ),
        "sliding window": (window, {}, everything),
        "sliding window, left padding": (window, {"attention_mask": left.long()}, left),
        "sliding window, global tokens, left padding": (
            window | {"global_tokens": 2},
            {"attention_mask": left.long()},
            left,
        ),
        "sliding window, documents": (window, {"document_ids": documents}, row),
        "memory, left padding": (memory, {"attention_mask": left.long()}, left),
        "memory, documents": (memory, {"document_ids": documents}, row),
    }


@pytest.mark.parametrize("case", attention_cases())
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.usefixtures("uncompiled")
def test_attention_implementations_agree(case, implementation):
    overrides, inputs, counts = attention_cases()[case]
    model = tiny_model(tiny_config(**overrides))
    ids = token_ids(rows=counts.shape[0])
    model.set_attn_implementation("eager")
    expected = run(model, ids, num_loops=3, **inputs).logits
    model.set_attn_implementation(implementation)
    if implementation == "flex_attention" and "memory" in case:
        with pytest.raises(InvalidConfigError, match="attention memory"):
            run(model, ids, **inputs)
        return
    torch.testing.assert_close(
        run(model, ids, num_loops=3, **inputs).logits[counts], expected[counts], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("case", ["plain", "left padding", "documents by ids", "sliding window"])
def test_gradients_agree_between_eager_and_sdpa(case):
    overrides, inputs, counts = attention_cases()[case]
    model = tiny_model(tiny_config(**overrides))
    ids = token_ids(rows=counts.shape[0])
    gradients = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids.masked_fill(~counts, -100), num_loops=3, **inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_compiled_flex_attention_agrees():
    model = tiny_model()
    _, inputs, counts = attention_cases()["left padding"]
    expected = run(model, token_ids(), **inputs).logits[counts]
    model.set_attn_implementation("flex_attention")
    logits = run(model, token_ids(), **inputs).logits[counts]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_attention_implementation_can_be_chosen_and_changed(tmp_path):
    model = tiny_model()
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    for loaded in (
        CognexisForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"),
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"),
        AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="eager"),
    ):
        assert loaded.config._attn_implementation == "eager"
        assert run(loaded, token_ids(), output_attentions=True).attentions
        loaded.set_attn_implementation("sdpa")
        assert loaded.model.config._attn_implementation == "sdpa"
        sites = [m for m in loaded.modules() if type(m).__name__ == "AttentionSite"]
        assert len(sites) == 7 and all(site.config._attn_implementation == "sdpa" for site in sites)
    with pytest.raises((ValueError, ImportError), match="nonsense"):
        model.set_attn_implementation("nonsense")


# ---- activation checkpointing ----


def enable_checkpointing(model: Any, **options: Any) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)


def training_gradients(model: Any, seed: int = 0, **inputs: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)
    model(token_ids(), labels=token_ids(), num_loops=4, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_reentrant": True}, {"every_k_loops": 2}, {"every_k_loops": 3, "use_reentrant": True}],
    ids=str,
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointed_gradients_equal_plain_ones(variant, options):
    model = tiny_model(tiny_config(**VARIANTS[variant], ffn_dropout=0.1, attention_dropout=0.1))
    expected = training_gradients(model)
    enable_checkpointing(model, **options)
    assert model.is_gradient_checkpointing
    gradients = training_gradients(model)
    assert list(gradients) == list(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"every_k_loops": 2}], ids=str)
def test_checkpointing_recomputes_every_block_and_can_be_turned_off(options):
    model = tiny_model()
    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            module.register_forward_hook(count(name.removesuffix(".attention.q_proj")))
    once = {"model.prelude.blocks.0": 1, "model.prelude.blocks.1": 1, "model.recurrent.blocks.0": 4}
    once["model.coda.blocks.0"] = 1
    training_gradients(model)
    assert calls == once
    calls.clear()
    enable_checkpointing(model, **options)
    training_gradients(model)
    assert calls == {name: 2 * number for name, number in once.items()}
    calls.clear()
    run(model.eval(), token_ids())
    assert calls == once
    calls.clear()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    training_gradients(model)
    assert calls == once


def test_checkpointing_works_with_frozen_embeddings_and_reentrant_segments():
    model = tiny_model()
    trained = [p for name, p in model.named_parameters() if "recurrent" in name]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained))
    expected = training_gradients(model)
    model.enable_input_require_grads()
    enable_checkpointing(model, use_reentrant=True)
    gradients = training_gradients(model)
    assert list(gradients) == list(expected) and len(gradients) == len(trained)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)


def test_checkpointing_does_not_disturb_a_cache_or_hidden_states():
    model = tiny_model(tiny_config(state_retention="all"))
    expected = training_gradients(model)
    plain = model(token_ids(), output_hidden_states=True)
    enable_checkpointing(model)
    gradients = training_gradients(model, use_cache=True)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)
    output = model(token_ids(), output_hidden_states=True)
    assert_same_outputs(output.hidden_states, plain.hidden_states)
    assert_same_outputs(output.loop_states, plain.loop_states)


# ---- precision ----


def cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(left.float().flatten(), right.float().flatten(), dim=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_half_precision_stays_close(variant, dtype, implementation):
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    model.set_attn_implementation(implementation)
    expected = run(model, token_ids()).logits
    output = run(model.to(dtype), token_ids(), labels=token_ids())
    assert output.logits.dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    assert torch.isfinite(output.logits).all() and torch.isfinite(output.loss)
    assert cosine(output.logits, expected) > 0.999


def test_rotary_frequencies_stay_exact_through_casts():
    model = tiny_model()
    exact = model.model.rotary_emb.inv_freq.clone()
    for cast in (model.half, model.bfloat16, lambda: model.to(torch.bfloat16), model.double, model.float):
        cast()
        for buffer in model.model.rotary_emb.buffers():
            assert buffer.dtype == torch.float32
            torch.testing.assert_close(buffer, exact, rtol=0, atol=0)


def test_no_module_has_to_stay_in_float32(tmp_path):
    model = tiny_model()
    assert not model._keep_in_fp32_modules and not model._keep_in_fp32_modules_strict
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, "bfloat16"):
        loaded = CognexisForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert len({p.dtype for p in loaded.parameters()} | {loaded.dtype, loaded.config.dtype}) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_trains_with_float32_weights(checkpointing):
    model = tiny_model(tiny_config(backprop_loops=2)).train()
    if checkpointing:
        enable_checkpointing(model)
    reference = model(token_ids(), labels=token_ids()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(token_ids(), labels=token_ids()).loss
    loss.backward()
    assert abs(loss - reference) < 0.05
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# ---- copies, devices, placement ----


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(copied):
    model = tiny_model()
    model.generate(token_ids(), max_new_tokens=2)
    other = copied(model)
    assert_same_outputs(run(other, token_ids()), run(model, token_ids()))
    assert is_tied(other)
    before = run(model, token_ids())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.config.default_loops = 1
    other.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    assert_same_outputs(run(model, token_ids()), before)


def test_copied_configuration_is_the_one_that_its_parts_read():
    other = copy.deepcopy(tiny_model())
    assert all(m.config is other.config for m in other.modules() if hasattr(m, "config"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_is_built_on_the_meta_device_and_filled_later(variant):
    config = tiny_config(**VARIANTS[variant])
    with torch.device("meta"):
        model = CognexisForCausalLM(config)
    names = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, tensor in names if not tensor.is_meta] == []
    model.to(torch.bfloat16).to(torch.float32)
    model = model.to_empty(device="cpu")
    model.init_weights()
    assert [name for name, p in model.named_parameters() if not torch.isfinite(p).all()] == []
    source = tiny_model(config)
    model.load_state_dict(source.state_dict())
    assert_same_outputs(run(model.eval(), token_ids()), run(source, token_ids()))


@pytest.mark.parametrize(("name", "billions"), [("cognexis-8b", 8), ("cognexis-64b", 64)])
def test_published_sizes_are_built_without_memory(name, billions):
    with torch.device("meta"):
        model = CognexisForCausalLM(CognexisConfig.from_variant(name))
    assert round(model.num_parameters() / 1e9) == billions


def test_checkpoint_loads_straight_to_a_device(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = CognexisForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert_same_outputs(run(loaded, token_ids()), run(model, token_ids()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_device_map_spreads_the_model_over_memory_and_disk(tmp_path, variant, share):
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    model.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    loaded = CognexisForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": int(share * size)}, offload_folder=tmp_path / "disk"
    )
    assert "disk" in loaded.hf_device_map.values()
    assert share < 0.5 or "cpu" in loaded.hf_device_map.values()
    assert not [name for name in loaded.hf_device_map if re.search(r"recurrent\.|blocks\.\d+\.", name)]
    for loops in (1, 3):
        expected = run(model, token_ids(), num_loops=loops).logits
        torch.testing.assert_close(run(loaded, token_ids(), num_loops=loops).logits, expected)
    expected = model.generate(token_ids(), max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(token_ids(), max_new_tokens=4, do_sample=False), expected)


def test_unsplittable_modules_exist():
    models = (tiny_model(), tiny_model(tiny_config(**overrides("lstm", "coda"))))
    names = {type(module).__name__ for model in models for module in model.modules()}
    assert set(CognexisForCausalLM._no_split_modules) <= names


@pytest.mark.parametrize("variant", VARIANTS)
def test_parallel_plans_name_modules_that_exist(variant):
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    modules = {re.sub(r"\.\d+", ".*", name) for name, _ in model.model.named_modules()}
    for plan in (model.config.base_model_tp_plan, model.config.base_model_fsdp_plan):
        absent = {key for key in plan if key not in modules}
        assert all("gate_proj" in key or "memory_" in key for key in absent), "only optional layers may be absent"
    heads = {f"model.{key}" for key in model.config.base_model_tp_plan} | {"lm_head"}
    split = {
        re.sub(r"\.\d+", ".*", name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.search(r"attention\.|feed_forward\.|lm_head", name)
    }
    assert split <= heads, "these layers depend on the number of heads or the width, but no plan splits them"


# ---- compilation ----


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    """A compiler backend that counts graphs and runs them as they are."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def test_forward_compiles_to_one_graph_per_loop_count(counter):
    model = tiny_model(tiny_config(num_prelude_blocks=1))
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for round_number in range(2):
        for loops in (1, 2, 3):
            ids = token_ids(seed=round_number)
            logits = run(compiled, ids, num_loops=loops).logits
            torch.testing.assert_close(logits, run(model, ids, num_loops=loops).logits, rtol=1e-5, atol=1e-5)
            assert counter.frame_count == (3 if round_number else loops)


@pytest.mark.slow
def test_padded_and_packed_batches_compile_to_one_graph_each(counter):
    model = tiny_model()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    cases = attention_cases()
    for number, case in enumerate(("left padding", "documents by ids"), start=1):
        _, inputs, counts = cases[case]
        for seed in range(2):
            ids = token_ids(rows=counts.shape[0], seed=seed)
            logits = run(compiled, ids, num_loops=2, **inputs).logits
            expected = run(model, ids, num_loops=2, **inputs).logits
            torch.testing.assert_close(logits[counts], expected[counts], rtol=1e-4, atol=1e-4)
        assert counter.frame_count == number


@pytest.mark.slow
def test_training_step_compiles_to_one_graph(counter):
    model = tiny_model().train()
    expected = training_gradients(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        model.zero_grad()
        compiled(token_ids(), labels=token_ids(), num_loops=4, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert counter.frame_count == 1


def test_decoding_with_a_static_cache_compiles_to_one_graph(counter):
    model, loops = tiny_model(tiny_config(num_prelude_blocks=1)), 3
    ids = token_ids(length=12)
    expected = run(model, ids, num_loops=loops, use_cache=False).logits
    cache = CognexisCache(model.config, "static", max_cache_len=16)
    run(model, ids[:, :6], past_key_values=cache, num_loops=loops)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for position in range(6, 12):
        step = ids[:, position : position + 1].contiguous()
        logits = run(compiled, step, past_key_values=cache, num_loops=loops).logits
        torch.testing.assert_close(logits[:, 0], expected[:, position], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_generate_with_a_compiled_forward_reuses_its_graphs(counter):
    model = tiny_model()
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_loops": 2}
    expected = model.generate(token_ids(), **arguments)
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True, dynamic=False)
    assert torch.equal(model.generate(token_ids(), cache_implementation="static", **arguments), expected)
    graphs = counter.frame_count
    assert graphs <= 2  # prompt and single tokens
    model.generate(token_ids(seed=1), cache_implementation="static", **arguments)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("cell, compiles", [("axon", True), ("lstm", False)])
def test_generation_compiles_models_that_are_one_graph_only(cell, compiles):
    model = tiny_model(tiny_config(**overrides(cell, "core")))
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    cache = CognexisCache(model.config, "static", max_cache_len=16)
    run(model, token_ids(), past_key_values=cache, num_loops=2)
    request = GenerationConfig(compile_config=everywhere)
    assert model._valid_auto_compile_criteria({"past_key_values": cache}, request) == compiles


@pytest.mark.slow
def test_inductor_gives_the_eager_result():
    torch._dynamo.reset()
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    logits = run(compiled, token_ids(), num_loops=2, use_cache=False).logits
    torch.testing.assert_close(logits, run(model, token_ids(), num_loops=2).logits, rtol=1e-4, atol=1e-4)
