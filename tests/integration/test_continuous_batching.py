"""Continuous batching at fixed loops gives what generate gives, and refuses what its paged cache cannot hold."""

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from cognexis.errors import InvalidConfigError, InvalidTokenIdError
from tests.batteries.invariance import limit, logits_of
from tests.batteries.tiny import tiny_config, tiny_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22, 23]]
NEW = 5
PAGES = {"num_blocks": 16, "block_size": 8, "max_batch_tokens": 32}


def without_end(model: Any) -> Any:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 2
    return model


@pytest.fixture
def model() -> Any:
    return without_end(tiny_model())


def settings(**kwargs: Any) -> Any:
    """Greedy decoding to the length limit; -1 is how the engine is told that no token ends a request."""
    given = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=2)
    for name, value in kwargs.items():
        setattr(given, name, value)
    return given


def batched(model: Any, generation_config: Any = None, prompts: Any = None, **kwargs: Any) -> list[list[int]]:
    """New tokens of each prompt, in the order of the prompts."""
    results = model.generate_batch(
        PROMPTS if prompts is None else prompts,
        generation_config=settings() if generation_config is None else generation_config,
        continuous_batching_config=ContinuousBatchingConfig(**PAGES),
        **kwargs,
    )
    results = [results[f"req_{i}"] for i in range(len(results))] if "req_0" in results else list(results.values())
    assert [r.error for r in results] == [None] * len(results)
    return [list(r.generated_tokens) for r in results]


def one_by_one(model: Any, loops: int) -> list[list[int]]:
    """Greedy decoding by hand; requires that no choice is a matter of rounding."""
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(NEW):
            best = logits_of(model, ids, loops)[:, -1].topk(2, dim=-1)
            assert best.values[0, 0] - best.values[0, 1] > 2 * limit(torch.float32, loops), "a tie: other prompt"
            ids = torch.cat((ids, best.indices[:, :1]), dim=1)
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_of_different_length_give_what_generate_gives(model: Any, attention: str, loops: int) -> None:
    expected = one_by_one(model, loops)
    generated = [
        model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False, num_loops=loops)[0, len(p) :].tolist()
        for p in PROMPTS
    ]
    assert generated == expected
    model.set_attn_implementation(attention)
    assert batched(model, num_loops=loops) == expected


def test_the_loop_count_comes_from_the_call_then_generation_configs_then_the_configuration() -> None:
    model = without_end(tiny_model(tiny_config(default_loops=3)))
    expected = {loops: one_by_one(model, loops) for loops in (1, 2, 3)}
    assert len({str(tokens) for tokens in expected.values()}) == 3
    assert batched(model) == expected[3]
    assert batched(model, settings(num_loops=2)) == expected[2]
    assert batched(model, settings(num_loops=2), num_loops=1) == expected[1]
    model.generation_config.num_loops = 1
    assert batched(model) == expected[1]
    assert model.config.default_loops == 3


@pytest.mark.parametrize(
    "overrides",
    [
        {"sliding_window": 4, "core_layer_types": ["sliding_attention"]},
        {"num_recurrent_blocks": 2, "experimental_multi_block": True},
        {"recurrent_init": "random"},
        {"num_prelude_blocks": 0, "input_injection": "concat_project"},
        {"num_coda_blocks": 0, "input_injection": "gate_condition"},
        {"stage_overrides": {"core": {"intermediate_size": 40}}},
    ],
    ids=["sliding", "two_blocks", "random_start", "no_prelude", "no_coda", "own_width"],
)
def test_other_cores_give_what_generate_gives(overrides: dict[str, Any]) -> None:
    model = without_end(tiny_model(tiny_config(**overrides)))
    assert batched(model, num_loops=2) == one_by_one(model, 2)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, reason",
    [
        ({"input_injection": "attention_memory"}, "attention memory"),
        (
            {"sliding_window": 4, "core_layer_types": ["sliding_attention"], "global_tokens": 2},
            "global tokens",
        ),
        ({"stage_overrides": {"core": {"num_key_value_heads": 4}}}, "equal head counts"),
        (
            {"stage_overrides": {"coda": {"num_attention_heads": 2, "num_key_value_heads": 1}}},
            "equal head counts",
        ),
    ],
    ids=["attention_memory", "global_tokens", "key_value_heads", "heads"],
)
def test_models_that_do_not_fit_the_paged_cache_are_refused(overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"generate_batch.*{reason}"):
        batched(tiny_model(tiny_config(**overrides)))


@pytest.mark.parametrize(
    "request_, path",
    [
        ({"num_loops": 5}, "num_loops"),
        ({"num_loops": 0}, "num_loops"),
        ({"num_loops": 2.0}, "num_loops"),
        ({"num_loops": 3, "max_loops": 2}, "num_loops"),
        ({"loop_mode": "adaptive_token"}, "loop_mode"),
        ({"num_loop": 2}, "num_loop"),
        ({"temperatur": 1.0}, "temperatur"),
    ],
    ids=str,
)
def test_a_request_that_generate_refuses_is_refused(model: Any, request_: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidConfigError, match=path) as caught:
        batched(model, **request_)
    assert caught.value.path == path
    assert model.config.default_loops == 4


@pytest.mark.parametrize(
    "name, value", [("top_p", 2.0), ("temperature", -1.0), ("repetition_penalty", 0.0), ("max_new_tokens", 0)]
)
def test_sampling_values_are_checked_as_in_generate(model: Any, name: str, value: Any) -> None:
    with pytest.raises(InvalidConfigError, match=name) as caught:
        batched(model, settings(do_sample=True, **{name: value}))
    assert caught.value.path == name


def test_more_loops_than_the_pages_hold_are_refused_and_never_cut(model: Any) -> None:
    """The engine lays out one page table per slot at its start, so it cannot grow as a dynamic cache does."""
    with pytest.raises(InvalidConfigError, match="num_loops"):
        batched(model, num_loops=6, allow_extrapolation=True)
    fewer_slots = without_end(tiny_model(tiny_config(kv_slots=2)))
    with pytest.raises(InvalidConfigError, match="kv_slots"):
        batched(fewer_slots, num_loops=3)
    assert batched(fewer_slots, num_loops=2) == one_by_one(fewer_slots, 2)


def test_an_empty_prompt_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="at least one"):
        batched(model, prompts=[[5, 6], []])


@pytest.mark.parametrize("wrong", [64, -1])
def test_ids_outside_the_vocabulary_are_refused(model: Any, wrong: int) -> None:
    with pytest.raises(InvalidTokenIdError, match=f"id {wrong} is outside the vocabulary") as caught:
        batched(model, prompts=[[5, 6], [7, wrong]])
    assert caught.value.token_id == wrong


def test_a_prompt_that_leaves_no_position_is_refused(model: Any) -> None:
    with pytest.raises(InvalidConfigError, match="max_position_embeddings=128"):
        batched(model, prompts=[[5, 6], [7] * 126])


def test_a_failing_engine_leaves_the_default_loop_count_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("interrupted")

    monkeypatch.setattr(model, "continuous_batching_context_manager", broken)
    with pytest.raises(OSError, match="interrupted"):
        batched(model, num_loops=2)
    assert model.config.default_loops == 4
