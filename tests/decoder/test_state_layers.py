"""Layers with memory over time in a model: generation, roll-back, training, initialisation, layers of one's own."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from cognexis import CognexisCache, CognexisConfig, CognexisForCausalLM, register_layer_type
from cognexis.cortex_layers import CortexStack
from cognexis.cortex_layers.td import CortexTD, CortexTDConfig
from cognexis.errors import CacheError, InvalidConfigError
from cognexis.looping.cost import core_flops_per_token
from tests.batteries.invariance import assert_same, left_padding, token_ids
from tests.batteries.state_layers import MIXTURES, overrides
from tests.batteries.tiny import tiny_config, tiny_model

MODELS = {
    "column_in_the_core": overrides("column", "core"),
    "no_attention": MIXTURES["no_attention_anywhere"],
    "core_of_two": MIXTURES["core_of_attention_and_memory"],
}
OTHERS = ("no_attention", "core_of_two")
RULE = {"type": "rule_based", "min_delta": 0.3}
NEW = 8


def looped(name: str = "column_in_the_core", seed: int = 0, **settings: Any) -> Any:
    return tiny_model(tiny_config(trained_max_loops=4, **MODELS[name] | settings), seed=seed).double()


@pytest.fixture(
    scope="module", params=["column_in_the_core", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def model(request) -> Any:
    """A model that no test changes."""
    return looped(request.param)


def prompt(model: Any, rows: int = 3) -> dict[str, Tensor]:
    mask = left_padding([9, 7, 4])[:rows]
    return {"input_ids": token_ids(model, *mask.shape), "attention_mask": mask}


def generated(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 2}
    return model.generate(**inputs, **settings | kwargs)


@torch.no_grad()
def by_hand(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Greedy decoding that computes the whole text anew for every token."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(NEW):
        logits = model(ids, attention_mask=mask, use_cache=False, **kwargs).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
        mask = nn.functional.pad(mask, (0, 1), value=1)
    return ids


# -- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {"speculative_draft_loops": 1, "speculative_tokens": 3},
    ],
    ids=["dynamic", "static", "no_cache", "chunked_prefill", "self_speculation"],
)
def test_generate_gives_what_computing_everything_anew_gives(model: Any, settings: dict[str, Any]) -> None:
    inputs = prompt(model)
    assert torch.equal(generated(model, inputs, num_loops=3, **settings), by_hand(model, inputs, num_loops=3))


def test_beams_continue_each_others_states(model: Any) -> None:
    inputs = prompt(model)
    expected = generated(model, inputs, num_loops=2, num_beams=3, use_cache=False)
    assert torch.equal(generated(model, inputs, num_loops=2, num_beams=3), expected)


@pytest.mark.parametrize("assistant", ["other", "itself", "early_exit", "lookup"])
def test_assisted_decoding_rolls_states_back(model: Any, assistant: str) -> None:
    inputs = prompt(model, rows=1)
    first_exit = model.config.first_loop_slot + model.config.num_recurrent_blocks
    settings: dict[str, Any] = {
        "other": {"assistant_model": tiny_model(model.config, seed=5).double()},
        "itself": {"assistant_model": model},
        "early_exit": {"assistant_early_exit": first_exit},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[assistant]
    assert torch.equal(generated(model, inputs, num_loops=3, **settings), by_hand(model, inputs, num_loops=3))


@pytest.mark.parametrize("mode", ["adaptive_sequence", "adaptive_token"])
def test_adaptive_rows_are_the_same_alone_and_in_a_batch(model: Any, mode: str) -> None:
    inputs = prompt(model)
    settings = {"loop_mode": mode, "scheduler": RULE, "return_loop_stats": True}
    together = generated(model, inputs, **settings)
    assert len({int(n) for n in together.loop_counts.flatten()}) > 1
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(generated(model, alone, **settings).sequences[0], together.sequences[row])


def test_tokens_that_stop_by_themselves_give_what_no_cache_gives(model: Any) -> None:
    inputs = prompt(model)
    settings = {"loop_mode": "adaptive_token", "scheduler": RULE, "halt_dependency": "token"}
    assert torch.equal(generated(model, inputs, **settings), generated(model, inputs, use_cache=False, **settings))


@pytest.mark.parametrize("name", ["max_total_loops", "max_recurrent_flops"])
def test_budgets_hold(model: Any, name: str) -> None:
    flops = core_flops_per_token(model.config, 9, 9)
    limit = {name: {"max_total_loops": 12, "max_recurrent_flops": 30 * flops}[name]}
    output = generated(model, prompt(model), num_loops=3, return_loop_stats=True, **limit)
    assert output.sequences.shape[1] < 9 + NEW
    assert "budget_exhausted" in output.stop_reasons


def test_a_limit_of_cache_bytes_counts_the_states() -> None:
    model = looped("no_attention")
    inputs = prompt(model)
    unlimited = generated(model, inputs, num_loops=3)
    assert torch.equal(generated(model, inputs, num_loops=3, max_cache_memory_bytes=10**7), unlimited)
    with pytest.raises(Exception, match="budget does not suffice"):
        generated(model, inputs, num_loops=3, max_cache_memory_bytes=1000)


def test_right_padding_is_refused_in_generate_only(model: Any) -> None:
    inputs = prompt(model) | {"attention_mask": prompt(model)["attention_mask"].flip(1)}
    with pytest.raises(InvalidConfigError, match="pad on the left"):
        generated(model, inputs)
    assert model(**inputs).logits.isfinite().all()


# -- the cache -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run(model: Any, ids: Tensor, cache: Any, chunks: Sequence[int], loops: int = 2) -> Tensor:
    start, pieces = int(cache.get_seq_length()), []
    for size in chunks:
        piece = model(ids[:, start : start + size], past_key_values=cache, num_loops=loops)
        pieces.append(piece.logits)
        start += size
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("chunks", [(5, 3), (5, 1, 1, 1), (2, 1, 5), (8,)])
@pytest.mark.parametrize("cropped", [1, 2, 3])
@torch.no_grad()
def test_recorded_tokens_can_be_taken_back(model: Any, chunks: tuple[int, ...], cropped: int) -> None:
    ids = token_ids(model, 2, 12)
    whole = model(ids, num_loops=2, use_cache=False).logits
    cache = CognexisCache(model.config)
    cache.activate_past_recording()
    wrong = torch.cat((ids[:, : 8 - cropped], (ids[:, 8 - cropped : 8] + 1) % 60), dim=1)
    run(model, wrong, cache, chunks)
    cache.crop(-cropped)
    assert int(cache.get_seq_length()) == 8 - cropped
    assert_same(run(model, ids, cache, [4 + cropped - 1, 1]), whole[:, 8 - cropped :], 2, "after the crop")
    cache.crop(-2)
    assert_same(run(model, ids, cache, [2]), whole[:, 10:], 2, "after a second crop")


@torch.no_grad()
def test_what_was_not_recorded_cannot_be_taken_back_and_nothing_is_lost(model: Any) -> None:
    ids = token_ids(model, 2, 9)
    cache = CognexisCache(model.config)
    run(model, ids, cache, [6])
    with pytest.raises(CacheError, match="activate_past_recording"):
        cache.crop(-1)
    cache.crop(0)
    whole = model(ids, num_loops=2, use_cache=False).logits
    assert_same(run(model, ids, cache, [3]), whole[:, 6:], 2)


@torch.no_grad()
def test_rows_can_be_picked_and_repeated(model: Any) -> None:
    ids = token_ids(model, 3, 9)
    whole = model(ids, num_loops=2, use_cache=False).logits
    cache = CognexisCache(model.config)
    run(model, ids, cache, [6])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    rows = torch.tensor([0, 2, 2, 0])
    assert_same(run(model, ids[rows], cache, [2, 1]), whole[rows, 6:], 2)


def test_states_of_a_stopped_beam_are_picked_at_mixed_depths(model: Any) -> None:
    inputs = prompt(model)
    settings = {"loop_mode": "adaptive_token", "scheduler": RULE, "num_beams": 2, "halt_dependency": "token"}
    assert torch.equal(generated(model, inputs, **settings), generated(model, inputs, use_cache=False, **settings))


@torch.no_grad()
def test_the_memory_of_a_model_without_attention_does_not_grow() -> None:
    model = looped("no_attention")
    sizes = []
    for length in (5, 50, 500):
        cache = CognexisCache(model.config)
        run(model, token_ids(model, 1, length), cache, [length])
        sizes.append(cache.memory_bytes())
    assert sizes[0] == sizes[1] == sizes[2] > 0
    cache.reset()
    assert cache.memory_bytes() == 0 and cache.get_seq_length() == 0
    cache.release()
    with pytest.raises(CacheError, match="released"):
        run(model, token_ids(model, 1, 2), cache, [2])


def test_a_model_without_attention_has_no_last_position() -> None:
    model = looped("no_attention", max_position_embeddings=8)
    assert generated(model, prompt(model), num_loops=1).shape == (3, 9 + NEW)


@torch.no_grad()
def test_faulty_calls_name_what_is_wrong(model: Any) -> None:
    ids = token_ids(model, 2, 6)
    with pytest.raises(CacheError, match="CognexisCache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache(config=model.config), num_loops=1)
    cache = CognexisCache(model.config)
    run(model, ids, cache, [4])
    with pytest.raises(CacheError, match="batch size 2, (the )?new .* (have )?1"):
        model(ids[:1, 4:], past_key_values=cache, num_loops=2)
    hole = torch.tensor([[1, 1, 0, 0, 1, 1]] * 2)
    with pytest.raises(InvalidConfigError, match="padding between real tokens"):
        model(ids, attention_mask=hole)
    with pytest.raises(InvalidConfigError, match="two axes"):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool).tril())
    with pytest.raises(InvalidConfigError, match="exact form only"):
        model(ids, loop_mode="adaptive_token", scheduler=RULE, cache_policy="last_exited")
    with pytest.raises(InvalidConfigError, match="states over time"):
        model.generate_batch([[1, 2, 3]])


# -- training --------------------------------------------------------------------------------------------------------


def gradients(model: Any, ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_give_the_same_gradients(model: Any, every: int) -> None:
    trained, ids = copy.deepcopy(model).train(), token_ids(model, 2, 7)
    expected = gradients(trained, ids, num_loops=3, use_cache=False)
    trained.gradient_checkpointing_enable({"every_k_loops": every})
    for name, gradient in gradients(trained, ids, num_loops=3).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_packed_documents_have_the_gradients_of_separate_ones(model: Any) -> None:
    trained, ids = copy.deepcopy(model).train(), token_ids(model, 1, 9)
    numbers = torch.tensor([[0] * 4 + [1] * 5])
    packed = gradients(trained, ids, num_loops=2, document_ids=numbers)
    labels = torch.where(torch.arange(9) == 4, -100, ids)  # the last token of a document predicts nothing
    trained.zero_grad()
    trained(ids, labels=labels, num_loops=2, document_ids=numbers).loss.backward()
    first = {name: p.grad.clone() for name, p in trained.named_parameters()}
    trained.zero_grad()
    losses = [trained(part, labels=part, num_loops=2).loss for part in (ids[:, :4], ids[:, 4:])]
    ((3 * losses[0] + 4 * losses[1]) / 7).backward()
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p.grad, first[name], rtol=1e-8, atol=1e-11, msg=name)
    assert packed.keys() == first.keys()


def test_the_residual_scale_of_the_core_scales_what_the_stack_adds() -> None:
    model = looped(recurrent_residual_mode="fixed", recurrent_residual_scale=0.0, recurrent_gating=False)
    block, x = model.model.recurrent.blocks[0], torch.randn(2, 5, 32, dtype=torch.float64)
    assert torch.equal(block(x), x)
    block.residual_scale = 0.5
    half = block(x) - x
    block.residual_scale = 1.0
    torch.testing.assert_close(half * 2, block(x) - x)


# -- construction and loading ----------------------------------------------------------------------------------------


def starts(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.model.recurrent.blocks[0].stack.named_parameters()}


def test_cells_keep_the_start_that_they_draw_themselves() -> None:
    config = tiny_config(core_layer_types=["cortex"], cortex={"pattern": "MS"})
    built, by_auto = CognexisForCausalLM(config), AutoModelForCausalLM.from_config(config)
    for model in (built, by_auto):
        gates = [p for name, p in starts(model).items() if name.endswith("igate.weight")]
        assert gates and all((p == 0).all() for p in gates)  # drawn by transformers they would not be zero


def test_tensors_that_a_checkpoint_lacks_get_the_start_of_the_cell(tmp_path) -> None:
    plain = tiny_model(tiny_config())
    plain.save_pretrained(tmp_path)
    cortex = {"core_layer_types": ["cortex"], "cortex": {"pattern": "AMS"}}
    model = CognexisForCausalLM.from_pretrained(tmp_path, verify="off", **cortex)
    fresh = starts(CognexisForCausalLM(model.config))
    for name, p in starts(model).items():
        assert p.isfinite().all(), name
        assert torch.equal(p == 0, fresh[name] == 0), name
        if p.numel() > 100:
            assert 0.5 < (p.std() / fresh[name].std()).nan_to_num(1.0) < 2.0, name


@pytest.mark.parametrize("name", ["cortex-tiny", "xlstm-tiny", "axon-tiny"])
def test_named_sizes_run_and_describe_themselves(name: str, tmp_path) -> None:
    config = CognexisConfig.from_variant(name, vocab_size=64)
    assert config.has_time_state and config.has_attention == (name != "xlstm-tiny")
    assert "cortex_layers" in config.nonstandard_features
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.cortex == config.cortex and again.layer_types == config.layer_types
    model = CognexisForCausalLM(config).eval()
    assert model(torch.randint(3, 64, (2, 5))).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"core_layer_types": ["cortex"]}, "cortex=None: cortex layers need a description"),
        ({"cortex": {"pattern": "A"}}, "no layer type is cortex"),
        ({"core_layer_types": ["cortex"], "cortex": {}}, "pattern"),
        ({"core_layer_types": ["cortex"], "cortex": {"pattern": "AQ"}}, "unknown token at position 1"),
        ({"core_layer_types": ["cortex"], "cortex": {"patern": "A"}}, "cortex.patern"),
        ({"core_layer_types": ["cortex"], "cortex": {"pattern": "A", "num_layers": 0}}, "cortex.num_layers"),
        ({"core_layer_types": ["cortex"], "cortex": {"core": "A"}}, "cortex.core"),
        ({"core_layer_types": ["cortex"], "cortex": {"pattern": "A", "coda": {"pattern": "A"}}}, "cortex.coda"),
        ({"core_layer_types": ["cortex"], "cortex": {"stack": {"blocks": [], "d_hidden": 16}}}, "hidden_size=32"),
        ({"core_layer_types": ["cortex"], "cortex": {"stack": {"blocks": []}, "pattern": "A"}}, "leave out pattern"),
        (
            {
                "core_layer_types": ["cortex"],
                "cortex": {"pattern": "M", "overrides": [{"cell_type": "mlstm", "num_heads": 5}]},
            },
            "num_heads",
        ),
        (
            {"core_layer_types": ["cortex"], "cortex": {"pattern": "A"}, "input_injection": "attention_memory"},
            "needs attention in the core",
        ),
        ({"core_layer_types": ["cortx"]}, "must be one of|entries must be one of"),
    ],
)
def test_faulty_descriptions_are_refused_before_anything_is_built(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfigError, match=words):
        tiny_config(**settings)


def test_custom_tokens_and_overrides_travel_with_the_configuration(tmp_path) -> None:
    cortex = {
        "pattern": "QM",
        "custom_tokens": {"Q": {"block_type": "postup", "cell": {"cell_type": "gru", "num_layers": 2}}},
        "overrides": [{"cell_type": "mlstm", "num_heads": 2}],
        "router": {"top_k": 1},
    }
    config = tiny_config(core_layer_types=["cortex"], cortex=cortex)
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    again = CognexisForCausalLM.from_pretrained(tmp_path)
    column = again.model.recurrent.blocks[0].stack.blocks[0]
    assert column.experts[0].cell.cfg.num_layers == 2 and column.experts[1].cell.cfg.num_heads == 2
    assert column.top_k == 1
    ids = token_ids(model, 2, 5)
    assert torch.equal(again(ids).logits, model(ids).logits)


# -- layers of one's own ---------------------------------------------------------------------------------------------


class RunningMean(nn.Module):
    """The smallest layer with a state: adds a running mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def init_state(self, batch: int, *, device: Any, dtype: torch.dtype, traces: bool = True) -> TensorDict:
        return TensorDict({"m": torch.zeros(batch, self.proj.in_features, device=device, dtype=dtype)}, [batch])

    def forward(self, x: Tensor, state: TensorDict, *, resets: Tensor | None = None) -> tuple[Tensor, TensorDict]:
        mean, outputs = state["m"], []
        for t in range(x.shape[1]):
            if resets is not None:
                mean = torch.where(resets[:, t, None], 0.0, mean)
            mean = 0.9 * mean + 0.1 * x[:, t]
            outputs.append(mean)
        return x + self.proj(torch.stack(outputs, 1)), TensorDict({"m": mean}, [x.shape[0]])


class FeedForwardOnly(nn.Module):
    """A layer without memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states + self.proj(hidden_states)


def running_mean(config: Any, stage: str, slots: Sequence[int]) -> nn.Module:
    return RunningMean(config.hidden_size)


def feed_forward_only(config: Any, stage: str, slots: Sequence[int]) -> nn.Module:
    return FeedForwardOnly(config.hidden_size)


def test_registered_layers_are_layers_like_others(tmp_path) -> None:
    register_layer_type("running_mean", running_mean)
    register_layer_type("feed_forward_only", feed_forward_only, has_state=False)
    register_layer_type("running_mean", running_mean)  # again is no fault
    config = tiny_config(
        prelude_layer_types=["feed_forward_only", "full_attention"],
        core_layer_types=["running_mean"],
        coda_layer_types=["running_mean"],
    )
    model = tiny_model(config).double()
    inputs = prompt(model)
    for settings in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        kept = {name: value for name, value in settings.items() if name == "num_beams"}
        expected = generated(model, inputs, num_loops=3, use_cache=False, **kept)
        assert torch.equal(generated(model, inputs, num_loops=3, **settings), expected)
    model.save_pretrained(tmp_path)
    again = CognexisForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    adaptive = {"loop_mode": "adaptive_token", "scheduler": RULE, "halt_dependency": "token"}
    assert torch.equal(generated(model, inputs, **adaptive), generated(model, inputs, use_cache=False, **adaptive))
    foreign = tiny_model(tiny_config(core_layer_types=["feed_forward_only"]))
    with pytest.raises(InvalidConfigError, match="fixed number of loops"):
        foreign(inputs["input_ids"], loop_mode="adaptive_token", scheduler=RULE)


@pytest.mark.parametrize(
    ("name", "builder"), [("cortex", running_mean), ("a b", running_mean), ("memory_of_mine", "no function")]
)
def test_what_cannot_be_registered_is_refused(name: str, builder: Any) -> None:
    with pytest.raises(InvalidConfigError):
        register_layer_type(name, builder)
    with pytest.raises(InvalidConfigError):
        tiny_config(core_layer_types=["memory_of_mine"])


# -- the model as a stack --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_without_attention_is_a_stack() -> None:
    model = looped("no_attention")
    stack = model.as_cortex_stack(num_loops=3)
    assert isinstance(stack, CortexStack) and stack.d_hidden == 32
    x, resets = torch.randn(2, 9, 32, dtype=torch.float64), torch.rand(2, 9) < 0.3
    body = model.model(inputs_embeds=x, num_loops=3, use_cache=False).last_hidden_state
    assert_same(stack(x)[0], body, 3, "the model's own forward")
    whole, last = stack(x, resets=resets)
    state, pieces = stack.init_state(2, dtype=torch.float64), []
    for start, end in ((0, 3), (3, 4), (4, 9)):
        piece, state = stack(x[:, start:end], state, resets=resets[:, start:end])
        pieces.append(piece)
    assert_same(torch.cat(pieces, dim=1), whole, 3, "chunks")
    assert set(state.keys(True, True)) == set(last.keys(True, True))
    fresh = stack.reset_state(state, torch.tensor([True, False]))
    step, _ = stack.step(x[:, 0], fresh)
    assert_same(step[:1], stack(x[:1, :1])[0][:, 0], 3, "a row that was reset")
    assert_same(step[1:], stack(x[1:, :1], state[1:])[0][:, 0], 3, "a row that goes on")


def test_the_stack_trains_the_models_weights_and_serves_agents() -> None:
    model = looped("no_attention").float().train()
    stack = model.as_cortex_stack(num_loops=2)
    stack(torch.randn(2, 4, 32))[0].sum().backward()
    assert all(p.grad is not None for p in model.model.recurrent.parameters())
    agent = CortexTD(CortexTDConfig(in_key="x", out_key="y", d_hidden=32, stack=stack))
    step = TensorDict({"x": torch.randn(2, 32), "bptt": torch.ones(2), "batch": torch.full((2,), 2)}, [2])
    first, second = agent(step.clone())["y"], agent(step.clone())["y"]
    assert first.shape == (2, 32) and not torch.equal(first, second)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing"):
        stack(torch.randn(2, 4, 32))


def test_a_model_with_attention_is_no_stack() -> None:
    with pytest.raises(InvalidConfigError, match="full_attention"):
        looped().as_cortex_stack()
    with pytest.raises(InvalidConfigError, match="recurrent_init"):
        looped("no_attention", recurrent_init="random").as_cortex_stack()
