"""generate(): every way of decoding gives the same tokens, loop keywords reach the loops, faults are typed errors."""

import copy
import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    QuantizedCache,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer, TextStreamer

from cognexis import CognexisCache, CognexisGenerateBeamOutput, CognexisGenerateOutput
from cognexis.artifacts.tokenizer_training import byte_reference_tokenizer
from cognexis.decoder.streaming import StepEvent, StepEventStreamer
from cognexis.errors import (
    ArtifactMismatchError,
    BudgetExceededError,
    CognexisError,
    InvalidConfigError,
    InvalidTokenIdError,
    NonFiniteError,
    ShapeMismatchError,
)
from tests.batteries.invariance import left_padding, limit, logits_of, token_ids
from tests.batteries.tiny import tiny_config, tiny_model

NEW = 6
PAD = 2


def without_end(model: Any) -> Any:
    """Let the model generate to the length limit."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@pytest.fixture
def model() -> Any:
    return without_end(tiny_model())


@pytest.fixture
def ids(model: Any) -> Tensor:
    return token_ids(model, 1, 5)


def most_likely(model: Any, ids: Tensor, loops: int, count: int = NEW, mask: Tensor | None = None) -> Tensor:
    """Greedy decoding by hand, without a cache; requires that no choice is a matter of rounding."""
    for _ in range(count):
        logits = logits_of(model, ids, loops, attention_mask=mask)[:, -1]
        best = logits.topk(2, dim=-1)
        assert (best.values[:, 0] - best.values[:, 1]).min() > 2 * limit(torch.float32, loops), "a tie: other prompt"
        ids = torch.cat((ids, best.indices[:, :1]), dim=1)
        mask = None if mask is None else torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return ids


def greedy(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    return model.generate(ids, do_sample=False, **({"max_new_tokens": NEW} | kwargs))


@contextmanager
def counted_loops(model: Any) -> Iterator[list[int]]:
    """Collects one entry per application of the core."""
    applications: list[int] = []
    hook = model.model.recurrent.loop_state.register_forward_hook(lambda *_: applications.append(1))
    yield applications
    hook.remove()


def llama(vocab_size: int = 64) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **heads, **special)).eval()


# -- every way of decoding -----------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "by default": lambda model: {},
    "without a cache": lambda model: {"use_cache": False},
    "static cache": lambda model: {"cache_implementation": "static"},
    "static cache with room": lambda model: {"cache_implementation": "static", "max_new_tokens": 40},
    "own cache": lambda model: {"past_key_values": CognexisCache(model.config)},
    "own static cache": lambda model: {"past_key_values": CognexisCache(model.config, "static", max_cache_len=16)},
    "stock cache": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "prefill by one": lambda model: {"prefill_chunk_size": 1},
    "prefill by two": lambda model: {"prefill_chunk_size": 2},
    "prefill by two, static": lambda model: {"prefill_chunk_size": 2, "cache_implementation": "static"},
    "prefill in one chunk": lambda model: {"prefill_chunk_size": 9},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "one loop drafts": lambda model: {"assistant_early_exit": 4},
    "two loops draft": lambda model: {"assistant_early_exit": 5},
    "all loops draft": lambda model: {"assistant_early_exit": 7},
    "another looped model drafts": lambda model: {"assistant_model": without_end(tiny_model(seed=3))},
    "the model itself drafts": lambda model: {"assistant_model": without_end(tiny_model())},
    "a llama drafts": lambda model: {"assistant_model": llama()},
    "sampling from the best token": lambda model: {"do_sample": True, "top_k": 1},
    "sampling at temperature zero": lambda model: {"do_sample": True, "temperature": 0.0},
    "one beam": lambda model: {"num_beams": 1},
    "all-ones mask": lambda model: {"attention_mask": torch.ones(1, 5, dtype=torch.long)},
    "given positions": lambda model: {"position_ids": torch.arange(5)[None]},
    "returning a dictionary": lambda model: {"return_dict_in_generate": True, "output_logits": True},
}


@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_of_decoding_emits_the_most_likely_tokens(model: Any, ids: Tensor, way: str, loops: int) -> None:
    settings = {"do_sample": False, "max_new_tokens": NEW} | WAYS[way](model)
    output = model.generate(ids, num_loops=loops, **settings)
    sequences = output if isinstance(output, Tensor) else output.sequences
    assert torch.equal(sequences[:, : 5 + NEW], most_likely(model, ids, loops))
    assert sequences.shape[1] == 5 + settings["max_new_tokens"]


def test_generate_prefills_the_prompt_once_and_then_decodes_step_by_step(
    model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, calls = model.model, []
    for name in ("decode_step", "prefill"):

        def spy(hidden_states: Tensor, *args: Any, _name: str = name, **kwargs: Any) -> Any:
            calls.append((_name, hidden_states.shape[1]))
            return getattr(type(body), _name)(body, hidden_states, *args, **kwargs)

        monkeypatch.setattr(body, name, spy)
    greedy(model, ids, num_loops=2)
    assert calls[0] == ("prefill", 5)
    assert [call for call in calls[1:] if call[0] == "decode_step"] == [("decode_step", 1)] * (NEW - 1)
    assert all(length == 1 for _, length in calls[1:])


@pytest.mark.parametrize("loops", [1, 4])
@pytest.mark.parametrize("way", ["by default", "without a cache", "static cache", "prefill by two"])
def test_a_padded_batch_emits_what_its_rows_emit_alone(model: Any, way: str, loops: int) -> None:
    ids, mask = token_ids(model, 3, 7), left_padding([7, 3, 5])
    together = greedy(model, ids, attention_mask=mask, num_loops=loops, **WAYS[way](model))
    assert torch.equal(together, most_likely(model, ids, loops, mask=mask))
    for row, length in enumerate((7, 3, 5)):
        alone = greedy(model, ids[row : row + 1, 7 - length :], num_loops=loops)
        assert torch.equal(together[row, 7 - length :], alone[0])


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"sliding_window": 4, "core_layer_types": ["sliding_attention"]},
        {"sliding_window": 4, "core_layer_types": ["sliding_attention"], "global_tokens": 2},
        {"input_injection": "attention_memory"},
        {"recurrent_init": "random"},
    ],
    ids=["sliding", "global_tokens", "attention_memory", "random_start"],
)
def test_special_cores_decode_a_padded_batch(overrides: dict[str, Any], cache: str | None) -> None:
    model = without_end(tiny_model(tiny_config(**overrides)))
    ids, mask = token_ids(model, 2, 6), left_padding([6, 4])
    output = greedy(model, ids, attention_mask=mask, num_loops=2, cache_implementation=cache)
    assert torch.equal(output, most_likely(model, ids, 2, mask=mask))


@pytest.mark.parametrize("way", ["prompt lookup", "one loop drafts", "the model itself drafts"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"sliding_window": 4, "core_layer_types": ["sliding_attention"]},
        {"sliding_window": 4, "core_layer_types": ["sliding_attention"], "global_tokens": 2},
        {"input_injection": "attention_memory"},
        {"num_recurrent_blocks": 2, "experimental_multi_block": True},
    ],
    ids=["sliding", "global_tokens", "attention_memory", "two_blocks"],
)
def test_special_cores_roll_their_caches_back_behind_drafts(overrides: dict[str, Any], way: str) -> None:
    model = without_end(tiny_model(tiny_config(**overrides)))
    ids = token_ids(model, 1, 6).repeat(1, 2)  # repetition, so that lookup finds something
    settings = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "one loop drafts": {"assistant_early_exit": model.config.first_loop_slot + model.config.num_recurrent_blocks},
        "the model itself drafts": {"assistant_model": without_end(tiny_model(tiny_config(**overrides)))},
    }
    output = greedy(model, ids, num_loops=3, max_new_tokens=10, **settings[way])
    assert torch.equal(output, most_likely(model, ids, 3, 10))


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_works_or_says_what_it_needs(model: Any, ids: Tensor, kind: str) -> None:
    if torch.cuda.is_available():
        assert torch.equal(greedy(model, ids, num_loops=2, cache_implementation=kind), most_likely(model, ids, 2))
        return
    with pytest.raises(CognexisError, match="offload"):
        greedy(model, ids, num_loops=2, cache_implementation=kind)


@pytest.mark.parametrize("backend", ["quanto", "hqq", "fp8"])
def test_a_quantized_cache_has_every_slot_and_stays_close(model: Any, ids: Tensor, backend: str) -> None:
    try:
        QuantizedCache(backend=backend, config=model.config)
    except (ImportError, ValueError) as error:
        pytest.skip(f"{backend}: {error}")
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    output = greedy(model, ids, num_loops=2, return_dict_in_generate=True, output_logits=True, **options)
    assert len(output.past_key_values.layers) == 7
    exact = logits_of(model, ids, 2)[:, -1]
    # eight bits keep about two digits of unit-scale logits; keys of another loop would be off by about one
    assert (output.logits[0] - exact).abs().max() < 0.25
    second = logits_of(model, output.sequences[:, :6], 2)[:, -1]
    assert (output.logits[1] - second).abs().max() < 0.25


def test_prompt_embeddings_decode_like_their_tokens(model: Any, ids: Tensor) -> None:
    embeds = model.model.embed_tokens(ids)
    expected = most_likely(model, ids, 2)
    new = model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=NEW, num_loops=2)
    assert torch.equal(new, expected[:, 5:])
    assert torch.equal(greedy(model, ids, inputs_embeds=embeds, num_loops=2), expected)


# -- beams and sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loops", [1, 4])
def test_enough_beams_find_the_best_sequence_of_all(loops: int) -> None:
    """With as many beams as tokens, two steps of beam search are exhaustive."""
    model = without_end(tiny_model(tiny_config(vocab_size=8)))
    ids = token_ids(model, 1, 4)
    found = model.generate(ids, num_beams=8, max_new_tokens=2, do_sample=False, num_loops=loops)
    every = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    log_p = logits_of(model, torch.cat((ids.expand(64, -1), every), dim=1), loops).log_softmax(-1)
    score = log_p[:, 3].gather(1, every[:, :1]) + log_p[:, 4].gather(1, every[:, 1:])
    assert torch.equal(found[0, 4:], every[score.argmax()])


@pytest.mark.parametrize("way", ["static cache", "without a cache", "own cache"])
def test_beams_move_all_slots_together(model: Any, way: str) -> None:
    ids, mask = token_ids(model, 2, 6), left_padding([6, 4])
    settings = {"num_beams": 3, "num_return_sequences": 2, "num_loops": 3, "attention_mask": mask}
    details = {"return_dict_in_generate": True, "output_scores": True}
    expected = greedy(model, ids, **settings, **details)
    output = greedy(model, ids, **settings, **details, **WAYS[way](model))
    assert torch.equal(output.sequences, expected.sequences)
    # sums of NEW log-probabilities, each within the tolerance of logits
    assert (output.sequences_scores - expected.sequences_scores).abs().max() < NEW * limit(torch.float32, 3)
    alone = greedy(model, ids[1:, 2:], **settings | {"attention_mask": None})
    assert torch.equal(expected.sequences[2:, 2:], alone)


def test_a_seed_repeats_a_sample_and_another_seed_does_not(model: Any, ids: Tensor) -> None:
    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, do_sample=True, max_new_tokens=12, num_loops=2)

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_distribution(model: Any, ids: Tensor, temperature: float) -> None:
    torch.manual_seed(0)
    drawn = model.generate(
        ids, do_sample=True, top_k=0, temperature=temperature, num_return_sequences=2000, max_new_tokens=1, num_loops=2
    )[:, -1]
    p = (logits_of(model, ids, 2)[0, -1] / temperature).softmax(-1)
    share = drawn.bincount(minlength=64) / 2000
    # five standard deviations of a share of 2000 draws
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 2000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_p": 0.2}, {"min_p": 0.5}])
def test_filters_keep_only_the_likely_tokens(model: Any, ids: Tensor, setting: dict[str, Any]) -> None:
    drawn = model.generate(
        ids, do_sample=True, num_return_sequences=300, max_new_tokens=1, num_loops=2, **{"top_k": 0} | setting
    )[:, -1]
    p = logits_of(model, ids, 2)[0, -1].softmax(-1)
    best = p.sort(descending=True)
    kept = {
        "top_k": 3,
        "top_p": int((best.values.cumsum(0) < 0.2).sum()) + 1,
        "min_p": int((p >= 0.5 * p.max()).sum()),
    }[next(iter(setting))]
    assert set(drawn.tolist()) == set(best.indices[:kept].tolist())


# -- where the loop count comes from -------------------------------------------------------------------------------


def loops_of(model: Any, ids: Tensor, **kwargs: Any) -> int:
    """Loops that a generation of one token really runs."""
    with counted_loops(model) as applications:
        model.generate(ids, max_new_tokens=1, do_sample=False, **kwargs)
    return len(applications)


def test_the_call_goes_before_generation_configs_and_these_before_the_configuration(ids: Tensor) -> None:
    model = without_end(tiny_model(tiny_config(default_loops=4)))
    assert loops_of(model, ids) == 4
    model.generation_config.num_loops = 3
    assert loops_of(model, ids) == 3
    given = GenerationConfig(pad_token_id=PAD)
    assert loops_of(model, ids, generation_config=given) == 3
    given.num_loops = 2
    assert loops_of(model, ids, generation_config=given) == 2
    assert loops_of(model, ids, generation_config=given, num_loops=1) == 1
    assert loops_of(model, ids, num_loops=torch.tensor(2)) == 2
    assert loops_of(model, ids, num_loops=None) == 3


def test_generation_config_accepts_the_keywords_in_its_constructor(model: Any, ids: Tensor) -> None:
    given = GenerationConfig(num_loops=2, pad_token_id=PAD)
    assert loops_of(model, ids, generation_config=given) == 2


def test_bounds_of_the_call_move_the_default_but_never_a_requested_count(model: Any, ids: Tensor) -> None:
    assert loops_of(model, ids, max_loops=2) == 2
    model.config.default_loops = 1
    assert loops_of(model, ids, min_loops=3) == 3
    for settings in ({"num_loops": 3, "max_loops": 2}, {"num_loops": 1, "min_loops": 2}):
        with pytest.raises(InvalidConfigError, match="num_loops") as caught:
            model.generate(ids, max_new_tokens=1, **settings)
        assert caught.value.path == "num_loops"


@pytest.mark.parametrize("where", ["call", "generation_config"])
def test_more_loops_than_the_configuration_allows_need_permission(model: Any, ids: Tensor, where: str) -> None:
    settings = {"num_loops": 6} if where == "call" else {}
    if where == "generation_config":
        model.generation_config.num_loops = 6
    assert loops_of(model, ids, allow_extrapolation=True, **settings) == 6
    with pytest.raises(InvalidConfigError, match="num_loops=6: must lie between min_loops=1 and max_loops=4"):
        model.generate(ids, max_new_tokens=1, **settings)


def test_loop_settings_survive_saving_and_loading(model: Any, ids: Tensor, tmp_path: Path) -> None:
    model.generation_config.num_loops = 2
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["num_loops"] == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(loaded) is type(model)
    assert loops_of(loaded, ids) == 2
    assert loops_of(loaded, ids, num_loops=3) == 3
    assert torch.equal(greedy(loaded, ids), most_likely(model, ids, 2))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "generation_config.json").read_text())["num_loops"] == 2


def test_a_saved_generation_config_alone_can_be_passed(model: Any, ids: Tensor, tmp_path: Path) -> None:
    GenerationConfig(num_loops=3, max_new_tokens=1, pad_token_id=PAD).save_pretrained(tmp_path)
    with counted_loops(model) as applications:
        model.generate(ids, generation_config=GenerationConfig.from_pretrained(tmp_path))
    assert len(applications) == 3


# -- requests that are refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("num_loop", "num_loops"),
        ("nums_loops", "num_loops"),
        ("max_loop", "max_loops"),
        ("loop_mod", "loop_mode"),
        ("return_loops_stats", "return_loop_stats"),
        ("allow_extrapolate", "allow_extrapolation"),
        ("max_new_token", "max_new_tokens"),
        ("temperatur", "temperature"),
        ("attn_mask", "attention_mask"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(model: Any, ids: Tensor, name: str, nearest: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"'{name}'.*did you mean '{nearest}'") as caught:
        model.generate(ids, **{"max_new_tokens": 1, name: 1})
    assert caught.value.path == name


def test_an_unknown_keyword_that_is_near_to_nothing_is_refused_all_the_same(model: Any, ids: Tensor) -> None:
    with pytest.raises(InvalidConfigError, match="'xyzzy'") as caught:
        model.generate(ids, max_new_tokens=1, xyzzy=1)
    assert caught.value.path == "xyzzy"


NAN, INF = float("nan"), float("inf")
# What stands in a request, and the field that the error must name.
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"max_new_tokens": v}, "max_new_tokens") for v in (0, -1, NAN, "5", 10**9, 2.0, True)),
    *(({"temperature": v}, "temperature") for v in (-1, NAN, INF, -INF, "1", True)),
    *(({"top_p": v, "do_sample": True}, "top_p") for v in (0, 0.0, -0.1, 2.0, NAN, INF, "1")),
    *(({"top_k": v, "do_sample": True}, "top_k") for v in (-1, 2.5, NAN, "3")),
    *(({"min_p": v}, "min_p") for v in (-0.1, 1.1, NAN)),
    *(({"typical_p": v}, "typical_p") for v in (0, 1.1, NAN)),
    *(({"repetition_penalty": v}, "repetition_penalty") for v in (0, -1.0, NAN, INF)),
    *(({"num_beams": v}, "num_beams") for v in (0, -1, True, 2.0, 2**17)),
    *(({"num_return_sequences": v}, "num_return_sequences") for v in (0, -1, 1.5)),
    *(({"num_loops": v}, "num_loops") for v in (0, -1, 5, 2.0, NAN, "2", True, 10**9)),
    ({"num_loops": torch.tensor([[2]])}, "num_loops"),
    ({"num_loops": torch.tensor([5])}, "num_loops"),
    ({"num_loops": torch.tensor(2.0)}, "num_loops"),
    ({"num_loops": torch.tensor(True)}, "num_loops"),
    ({"num_loops": 10**9, "allow_extrapolation": True}, "num_loops"),
    *(({"loop_mode": v}, "loop_mode") for v in ("fast", "Fixed", 3)),
    *(({"min_loops": v}, "min_loops") for v in (0, -1, 1.5, 5)),
    *(({"max_loops": v}, "max_loops") for v in (0, -1, 1.5, 5)),
    ({"min_loops": 3, "max_loops": 2}, "min_loops"),
    ({"allow_extrapolation": "yes"}, "allow_extrapolation"),
    *(({"eos_token_id": v}, "eos_token_id") for v in (64, -1, [1, 99], "1", 1.0)),
    ({"eos_token_id": torch.tensor([1, 99])}, "eos_token_id"),
    ({"pad_token_id": 64}, "pad_token_id"),
    *(({"stop_strings": v}, "stop_strings") for v in (["a"] * 10_000, [""], "", "x" * 2**20, [], [3])),
    *(({"prompt_lookup_num_tokens": v}, "prompt_lookup_num_tokens") for v in (0, -2, 1.5)),
    *(({"assistant_early_exit": v}, "assistant_early_exit") for v in (0, 3, 8, -1, 4.5, "4")),
    *(({"prefill_chunk_size": v}, "prefill_chunk_size") for v in (0, -1)),
    ({"max_new_tokens": 125}, "max_new_tokens"),
]


@pytest.mark.parametrize(
    "settings, path",
    REFUSED,
    ids=[",".join(f"{k}={str(v)[:24]}" for k, v in settings.items()) for settings, _ in REFUSED],
)
def test_a_value_out_of_range_is_a_typed_error_before_any_forward(
    model: Any, ids: Tensor, settings: dict[str, Any], path: str
) -> None:
    before = copy.deepcopy(model.config.__dict__)
    with counted_loops(model) as applications, pytest.raises(InvalidConfigError, match=path) as caught:
        model.generate(ids, **{"max_new_tokens": 3} | settings)
    assert (caught.value.path, caught.value.code, applications) == (path, "invalid_config", [])
    assert model.config.__dict__ == before


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"temperature": 1e308}, {"top_k": 0}, {"top_k": 1000}, {"top_p": 1.0}, {"min_p": 0.0}],
    ids=str,
)
def test_values_at_the_edge_of_their_range_are_accepted(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    output = model.generate(ids, do_sample=True, max_new_tokens=3, **settings)
    assert output.shape == (1, 8)
    assert output.min() >= 0 and output.max() < 64


def test_values_of_a_generation_config_are_checked_like_keywords(model: Any, ids: Tensor) -> None:
    for name, value in (("top_p", 2.0), ("num_beams", 0), ("num_loops", 9), ("temperature", -1.0)):
        given = GenerationConfig(max_new_tokens=2)
        setattr(given, name, value)
        with pytest.raises(InvalidConfigError, match=name) as caught:
            model.generate(ids, generation_config=given)
        assert caught.value.path == name


def test_a_request_of_too_many_tokens_in_all_exceeds_the_budget() -> None:
    model = without_end(tiny_model(tiny_config(max_position_embeddings=2**21)))
    with counted_loops(model) as applications, pytest.raises(BudgetExceededError, match="65536"):
        model.generate(token_ids(model, 1, 5), num_beams=65_536, max_new_tokens=2000)
    assert not applications


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive_search"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group_beam_search"),
        ({"force_words_ids": [[3]], "num_beams": 2}, "constrained_beam_search"),
        ({"dola_layers": "low"}, "dola_generation.*a shared core"),
        ({"use_mtp": True}, "use_mtp.*no multi-token prediction head"),
    ],
    ids=["contrastive", "group_beam", "constrained", "dola", "mtp"],
)
def test_modes_that_cannot_work_are_refused_with_the_reason(
    model: Any, ids: Tensor, settings: dict[str, Any], reason: str
) -> None:
    if "use_mtp" in settings and not hasattr(GenerationConfig(), "use_mtp"):
        pytest.skip("this transformers has no multi-token prediction")
    with counted_loops(model) as applications, pytest.raises(InvalidConfigError, match=reason):
        model.generate(ids, max_new_tokens=3, do_sample=False, **settings)
    assert not applications


@pytest.mark.parametrize("vocab_size", [32, 96])
def test_a_draft_model_of_another_vocabulary_is_refused(model: Any, ids: Tensor, vocab_size: int) -> None:
    with counted_loops(model) as applications, pytest.raises(InvalidConfigError, match="vocab"):
        greedy(model, ids, assistant_model=llama(vocab_size))
    assert not applications


# -- streaming -----------------------------------------------------------------------------------------------------


class Recording(BaseStreamer):
    """A streamer as transformers knows it: tokens, then the end."""

    def __init__(self) -> None:
        self.chunks: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.chunks.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


class Forced:
    """A logits processor that makes the model emit given tokens."""

    def __init__(self, tokens: list[int], prompt_length: int) -> None:
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.zeros_like(scores)
        scores[:, self.tokens[input_ids.shape[1] - self.prompt_length]] = 1.0
        return scores


@pytest.mark.parametrize("way", ["by default", "static cache", "prompt lookup", "one loop drafts"])
def test_a_streamer_receives_the_prompt_then_every_token_then_the_end(model: Any, ids: Tensor, way: str) -> None:
    streamer = Recording()
    output = greedy(model, ids, num_loops=2, streamer=streamer, **WAYS[way](model))
    assert streamer.chunks[0] == ids[0].tolist()
    assert [t for chunk in streamer.chunks for t in chunk] == output[0].tolist()
    assert streamer.ended == 1


def test_three_tokens_at_one_loop_are_three_events(model: Any, ids: Tensor) -> None:
    streamer = StepEventStreamer()
    output = greedy(model, ids, num_loops=1, max_new_tokens=3, streamer=streamer)
    shared = {"text_delta": "", "loop_count": 1, "effective_depth": 4, "halt_reason": "max_loops"}
    assert streamer.events == [
        StepEvent(token_id=token, safety_issue=None, stop_reason=reason, **shared)
        for token, reason in zip(output[0, 5:].tolist(), (None, None, "max_new_tokens"), strict=True)
    ]
    assert list(streamer) == streamer.events


@pytest.mark.parametrize("way", ["prompt lookup", "one loop drafts", "the model itself drafts", "prefill by two"])
def test_events_come_one_per_token_however_many_are_decoded_at_once(model: Any, ids: Tensor, way: str) -> None:
    ids = torch.cat((ids, ids, ids), dim=1)  # repetition, so that lookup finds something
    streamer = StepEventStreamer()
    output = greedy(model, ids, num_loops=4, max_new_tokens=10, streamer=streamer, **WAYS[way](model))
    assert [event.token_id for event in streamer.events] == output[0, 15:].tolist()
    assert {(event.loop_count, event.effective_depth) for event in streamer.events} == {(4, 7)}
    assert [event.stop_reason for event in streamer.events] == [None] * 9 + ["max_new_tokens"]


def test_the_last_event_names_the_end_token(model: Any, ids: Tensor) -> None:
    streamer = StepEventStreamer()
    greedy(model, ids, streamer=streamer, eos_token_id=9, logits_processor=[Forced([5, 7, 9, 11, 11, 11], 5)])
    assert [(e.token_id, e.stop_reason) for e in streamer.events] == [(5, None), (7, None), (9, "eos_token")]


def test_an_end_token_at_the_length_limit_counts_as_end_token(model: Any, ids: Tensor) -> None:
    streamer = StepEventStreamer()
    settings = {"max_new_tokens": 3, "eos_token_id": [9, 10], "logits_processor": [Forced([5, 7, 9], 5)]}
    output = greedy(model, ids, streamer=streamer, return_loop_stats=True, **settings)
    assert streamer.events[-1].stop_reason == "eos_token"
    assert output.stop_reasons == ["eos_token"]


def test_events_are_handed_to_a_callback_in_order(model: Any, ids: Tensor) -> None:
    seen: list[StepEvent] = []
    streamer = StepEventStreamer(on_event=seen.append)
    greedy(model, ids, num_loops=2, streamer=streamer)
    assert seen == streamer.events
    assert len(seen) == NEW


def test_events_of_several_sequences_are_refused(model: Any) -> None:
    with pytest.raises(InvalidConfigError, match="one sequence") as caught:
        greedy(model, token_ids(model, 2, 5), streamer=StepEventStreamer())
    assert caught.value.path == "streamer"


def test_two_interleaved_streams_keep_to_themselves(model: Any) -> None:
    prompts = token_ids(model, 2, 5)
    solo = []
    for row, loops in ((0, 1), (1, 4)):
        streamer = StepEventStreamer()
        greedy(model, prompts[row : row + 1], num_loops=loops, streamer=streamer)
        solo.append(streamer.events)
    barrier = threading.Barrier(2, timeout=60)  # every event waits for the other stream's
    streamers = [StepEventStreamer(on_event=lambda _: barrier.wait()) for _ in range(2)]
    run_together(
        lambda: greedy(model, prompts[:1], num_loops=1, streamer=streamers[0]),
        lambda: greedy(model, prompts[1:], num_loops=4, streamer=streamers[1]),
    )
    assert [s.events for s in streamers] == solo


def run_together(*calls: Callable[[], Any]) -> list[Any]:
    """Run ``calls`` in threads and return their results; an error of any is raised."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:  # handed on to the caller below
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# -- text ----------------------------------------------------------------------------------------------------------

SPECIAL = ["<s>", "</s>", "<pad>"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


def byte_level_tokenizer(vocab_size: int) -> Any:
    """Byte-level pairs: every byte is a token, so characters can be cut anywhere."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=SPECIAL)
    backend.train_from_iterator(["the loop runs the loop again and the state settles"] * 3, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **special, padding_side="left", model_max_length=128, chat_template=CHAT
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer(vocab_size=270)


@pytest.fixture(scope="module")
def text_model(tokenizer: Any) -> Any:
    return without_end(tiny_model(tiny_config(vocab_size=len(tokenizer))))


def forced_text(text_model: Any, tokenizer: Any, text: str, **kwargs: Any) -> Any:
    """Generate with the model made to write ``text``, byte by byte."""
    tokens = [tokenizer.convert_tokens_to_ids(piece) for byte in text.encode() for piece in _byte_piece(byte)]
    prompt = tokenizer("the loop", return_tensors="pt").input_ids
    force = Forced(tokens + [tokens[-1]] * 8, prompt.shape[1])
    settings = {"max_new_tokens": len(tokens), "do_sample": False, "num_loops": 1} | kwargs
    return text_model.generate(prompt, logits_processor=[force], tokenizer=tokenizer, **settings), tokens


def _byte_piece(byte: int) -> list[str]:
    return [_PIECES[byte]]


def _pieces() -> dict[int, str]:
    """The character that the byte-level alphabet uses for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(moved)}


_PIECES = _pieces()


@pytest.mark.parametrize("text", ["héllo", "a\u20acb", "\U0001f600!", "\U0001f468\u200d\U0001f469x", "né", "\ufffdx"])
def test_streamed_text_is_never_cut_inside_a_character(text_model: Any, tokenizer: Any, text: str) -> None:
    streamer = StepEventStreamer(tokenizer)
    _, tokens = forced_text(text_model, tokenizer, text, streamer=streamer)
    assert [event.token_id for event in streamer.events] == tokens
    assert "".join(event.text_delta for event in streamer.events) == text
    for event in streamer.events:
        assert event.text_delta in text
        assert event.text_delta != "\ufffd" or "\ufffd" in text


def test_a_character_that_is_never_completed_comes_with_the_last_event_only(text_model: Any, tokenizer: Any) -> None:
    streamer = StepEventStreamer(tokenizer)
    text = "ab\U0001f600"
    forced_text(text_model, tokenizer, text, streamer=streamer, max_new_tokens=4)  # two of its four bytes
    assert [event.text_delta for event in streamer.events[:3]] == ["a", "b", ""]
    assert set(streamer.events[3].text_delta) == {"\ufffd"}


def test_a_stop_string_ends_the_generation_behind_it(text_model: Any, tokenizer: Any) -> None:
    streamer = StepEventStreamer(tokenizer)
    output, tokens = forced_text(
        text_model, tokenizer, "go on STOP here", streamer=streamer, stop_strings=["STOP"], return_loop_stats=True
    )
    end = len("go on STOP")
    assert tokenizer.decode(output.sequences[0, -end:]) == "go on STOP"
    assert output.stop_reasons == ["stop_string"]
    assert output.loop_counts.shape == (1, end)
    assert streamer.events[-1].stop_reason == "stop_string"
    assert len(streamer.events) == end < len(tokens)


def test_a_stop_string_that_never_comes_leaves_the_length_limit(text_model: Any, tokenizer: Any) -> None:
    output, tokens = forced_text(text_model, tokenizer, "go on", stop_strings=["STOP"], return_loop_stats=True)
    assert output.loop_counts.shape == (1, len(tokens))
    assert output.stop_reasons == ["max_new_tokens"]


def test_a_draft_model_with_its_own_tokenizer_translates_the_prompt(text_model: Any, tokenizer: Any) -> None:
    """The two vocabularies differ, and the prompt has an id that the draft model's does not."""
    smaller = byte_level_tokenizer(vocab_size=262)
    prompt = tokenizer("the loop runs", return_tensors="pt").input_ids
    assert prompt.max() >= len(smaller)
    expected = greedy(text_model, prompt, num_loops=2)
    tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": smaller}
    output = greedy(text_model, prompt, num_loops=2, assistant_model=without_end(llama(len(smaller))), **tokenizers)
    assert torch.equal(output, expected)


@pytest.fixture(scope="module")
def generator(text_model: Any, tokenizer: Any) -> Any:
    return pipeline("text-generation", model=text_model, tokenizer=tokenizer)


def test_the_pipeline_continues_a_text(generator: Any, text_model: Any, tokenizer: Any) -> None:
    record = generator("the loop", max_new_tokens=NEW, do_sample=False, num_loops=2)[0]
    ids = most_likely(text_model, tokenizer("the loop", return_tensors="pt").input_ids, 2)
    assert record["generated_text"] == "the loop" + tokenizer.decode(ids[0, -NEW:], skip_special_tokens=True)


def test_the_pipeline_hands_the_loop_count_on(generator: Any, text_model: Any) -> None:
    for loops in (1, 3):
        with counted_loops(text_model) as applications:
            generator("the loop", max_new_tokens=2, do_sample=False, num_loops=loops)
        assert len(applications) == 2 * loops


def test_a_pipeline_batch_of_unequal_lengths_equals_single_calls(generator: Any) -> None:
    texts = ["the loop runs the loop", "a", "state settles"]
    settings = {"max_new_tokens": NEW, "do_sample": False, "num_loops": 3, "return_tensors": True}
    single = [generator(text, **settings)[0]["generated_token_ids"][-NEW:] for text in texts]
    batched = [r[0]["generated_token_ids"][-NEW:] for r in generator(texts, batch_size=3, **settings)]
    assert batched == single


def test_the_pipeline_answers_a_chat(generator: Any, text_model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "the loop"}]
    answer = generator(chat, max_new_tokens=NEW, do_sample=False, num_loops=2)[0]["generated_text"]
    assert answer[:-1] == chat
    prompt = tokenizer("user: the loop\na: ", return_tensors="pt").input_ids
    expected = most_likely(text_model, prompt, 2)[0, -NEW:]
    assert answer[-1] == {"role": "assistant", "content": tokenizer.decode(expected, skip_special_tokens=True)}
    several = generator([chat, chat], max_new_tokens=NEW, do_sample=False, num_loops=2)
    assert [x[0]["generated_text"] for x in several] == [answer, answer]


def test_the_pipeline_refuses_a_misspelt_keyword(generator: Any) -> None:
    with pytest.raises(InvalidConfigError, match="did you mean 'num_loops'"):
        generator("the loop", max_new_tokens=2, num_loop=2)


# -- statistics ----------------------------------------------------------------------------------------------------


def test_statistics_describe_every_new_token(model: Any) -> None:
    ids = token_ids(model, 2, 5)
    output = greedy(model, ids, num_loops=2, return_loop_stats=True)
    assert type(output) is CognexisGenerateOutput
    assert torch.equal(output.sequences, most_likely(model, ids, 2))
    assert output.loop_counts.tolist() == [[2] * NEW] * 2
    assert output.effective_depths.tolist() == [[5] * NEW] * 2
    assert output.halt_reasons == [["max_loops"] * NEW] * 2
    assert output.stop_reasons == ["max_new_tokens"] * 2
    assert output.budget_used.tolist() == [2 * NEW] * 2
    assert output.loop_diagnostics == {
        "loop_mode": "fixed",
        "requested_loops": 2,
        "min_loops": 1,
        "max_loops": 4,
        "extrapolated": False,
        "cache_policy": "depth_indexed",
        "phases": {
            "prefill": {"passes": 1, "mean_loops": 2.0, "max_loops": 2},
            "decode": {"passes": NEW - 1, "mean_loops": 2.0, "max_loops": 2},
        },
    }


def test_statistics_can_be_asked_for_in_a_generation_config(model: Any, ids: Tensor) -> None:
    given = GenerationConfig(max_new_tokens=2, num_loops=3, return_loop_stats=True, pad_token_id=PAD)
    assert model.generate(ids, generation_config=given).loop_counts.tolist() == [[3, 3]]
    assert isinstance(model.generate(ids, generation_config=given, return_loop_stats=False), Tensor)
    model.generation_config.return_loop_stats = True
    assert model.generate(ids, max_new_tokens=2, num_loops=1).loop_counts.tolist() == [[1, 1]]


def test_statistics_label_extrapolation(ids: Tensor) -> None:
    model = without_end(tiny_model(tiny_config(max_loops=6)))
    for loops, beyond in ((4, False), (5, True)):
        output = greedy(model, ids, num_loops=loops, return_loop_stats=True)
        assert output.loop_diagnostics["extrapolated"] is beyond
        assert output.effective_depths.unique().tolist() == [3 + loops]


def test_an_ended_row_counts_no_further_loops(model: Any) -> None:
    ids = token_ids(model, 2, 5)
    rows = most_likely(model, ids, 2)[:, 5:].tolist()
    end = next(t for t in rows[0][:3] if t not in rows[1])
    length = rows[0].index(end) + 1
    output = greedy(model, ids, num_loops=2, return_loop_stats=True, eos_token_id=end)
    assert output.sequences[0, 5:].tolist() == rows[0][:length] + [PAD] * (NEW - length)
    assert output.sequences[1, 5:].tolist() == rows[1]
    assert output.loop_counts.tolist() == [[2] * length + [0] * (NEW - length), [2] * NEW]
    assert output.effective_depths.tolist() == [[5] * length + [0] * (NEW - length), [5] * NEW]
    assert output.halt_reasons == [["max_loops"] * length, ["max_loops"] * NEW]
    assert output.stop_reasons == ["eos_token", "max_new_tokens"]


def test_statistics_of_a_row_do_not_depend_on_its_neighbours(model: Any) -> None:
    ids = token_ids(model, 2, 5)
    rows = most_likely(model, ids, 2)[:, 5:].tolist()
    end = next(t for t in rows[0][:3] if t not in rows[1])
    settings = {"num_loops": 2, "return_loop_stats": True, "eos_token_id": end}
    together = greedy(model, ids, **settings)
    for row in range(2):
        alone = greedy(model, ids[row : row + 1], **settings)
        length = alone.loop_counts.shape[1]
        assert together.loop_counts[row, :length].tolist() == alone.loop_counts[0].tolist()
        assert together.halt_reasons[row] == alone.halt_reasons[0]
        assert together.stop_reasons[row] == alone.stop_reasons[0]
        assert together.budget_used[row] == alone.budget_used[0]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tokens", [[5, PAD, 7], [5, 7, PAD], [PAD, PAD, PAD]], ids=str)
def test_a_generated_padding_token_is_a_token(model: Any, rows: int, tokens: list[int]) -> None:
    settings = {"max_new_tokens": 3, "eos_token_id": 1, "logits_processor": [Forced(tokens, 5)]}
    output = greedy(model, token_ids(model, rows, 5), num_loops=2, return_loop_stats=True, **settings)
    assert output.sequences[:, 5:].tolist() == [tokens] * rows
    assert output.loop_counts.tolist() == [[2, 2, 2]] * rows
    assert output.stop_reasons == ["max_new_tokens"] * rows


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_statistics_of_beams_describe_the_returned_sequences(model: Any, settings: dict[str, Any]) -> None:
    ids = token_ids(model, 2, 5)
    rows = 2 * settings.get("num_return_sequences", 1)
    output = greedy(model, ids, num_loops=2, return_loop_stats=True, **settings)
    assert type(output) is CognexisGenerateBeamOutput
    assert torch.equal(output.sequences, greedy(model, ids, num_loops=2, **settings))
    assert output.loop_counts.tolist() == [[2] * NEW] * rows
    assert output.budget_used.tolist() == [2 * NEW] * rows
    assert output.stop_reasons == ["max_new_tokens"] * rows


def test_statistics_of_several_samples_describe_each(model: Any) -> None:
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 2}
    output = model.generate(token_ids(model, 2, 5), num_loops=3, return_loop_stats=True, **settings)
    assert output.sequences.shape == (6, 7)
    assert output.loop_counts.tolist() == [[3, 3]] * 6


@pytest.mark.parametrize(
    "way",
    ["by default", "without a cache", "static cache", "prompt lookup", "prefill by two", "prefill by one"],
)
def test_the_budget_used_is_the_number_of_core_applications(model: Any, ids: Tensor, way: str) -> None:
    with counted_loops(model) as applications:
        output = greedy(model, ids, num_loops=3, return_loop_stats=True, **WAYS[way](model))
    assert output.budget_used.tolist() == [len(applications)]
    assert output.loop_counts.tolist() == [[3] * NEW]


def test_the_budget_used_includes_the_loops_of_drafts(model: Any, ids: Tensor) -> None:
    with counted_loops(model) as applications:
        output = greedy(model, ids, num_loops=4, return_loop_stats=True, assistant_early_exit=4)
    assert torch.equal(output.sequences, most_likely(model, ids, 4))
    assert output.loop_counts.tolist() == [[4] * NEW]
    assert output.budget_used.tolist() == [len(applications)]


def test_statistics_of_prompt_embeddings_cover_the_new_tokens(model: Any, ids: Tensor) -> None:
    output = model.generate(
        inputs_embeds=model.model.embed_tokens(ids), max_new_tokens=3, num_loops=2, return_loop_stats=True
    )
    assert output.loop_counts.tolist() == [[2, 2, 2]]


def test_a_callers_criterion_is_named_as_the_reason(model: Any, ids: Tensor) -> None:
    def after_two(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((1,), input_ids.shape[1] >= 7)

    output = greedy(model, ids, return_loop_stats=True, stopping_criteria=[after_two])
    assert output.loop_counts.shape == (1, 2)
    assert output.stop_reasons == ["cancelled"]


def test_an_exhausted_time_limit_is_named_as_the_reason(model: Any, ids: Tensor) -> None:
    output = greedy(model, ids, return_loop_stats=True, max_time=1e-9)
    assert output.loop_counts.shape == (1, 1)
    assert output.stop_reasons == ["budget_exhausted"]


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["by default", "without a cache", "static cache", "prompt lookup"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_logits_processor_that_gives_nan_fails_the_request(
    model: Any, ids: Tensor, do_sample: bool, way: str
) -> None:
    settings = {"max_new_tokens": NEW, "do_sample": do_sample} | WAYS[way](model)
    with pytest.raises(NonFiniteError, match="logits"):
        model.generate(ids, logits_processor=[lambda input_ids, scores: scores * NAN], **settings)


def test_a_logits_processor_that_hides_every_token_fails_the_request(model: Any, ids: Tensor) -> None:
    with pytest.raises(NonFiniteError, match="logits"):
        greedy(model, ids, logits_processor=[lambda input_ids, scores: torch.full_like(scores, -INF)])


def test_a_logits_processor_that_changes_the_shape_fails_the_request(model: Any, ids: Tensor) -> None:
    with pytest.raises(ShapeMismatchError):
        greedy(model, ids, logits_processor=[lambda input_ids, scores: scores[:, :5]])


def test_a_logits_processor_that_raises_fails_the_request_and_no_other(model: Any, ids: Tensor) -> None:
    def failing(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("broken processor")

    with pytest.raises(KeyError, match="broken processor"):
        greedy(model, ids, num_loops=2, logits_processor=[failing])
    assert torch.equal(greedy(model, ids, num_loops=2), most_likely(model, ids, 2))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("way", ["by default", "static cache", "prompt lookup"])
def test_a_weight_that_is_not_finite_stops_the_generation(ids: Tensor, value: float, way: str) -> None:
    model = without_end(tiny_model())
    model.model.final_norm.weight.data[3] = value
    with pytest.raises(NonFiniteError, match="logits"):
        greedy(model, ids, **WAYS[way](model))


def test_finished_and_failed_generations_leave_no_cache_behind(
    model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    build = CognexisCache.__init__

    def note(cache: Any, *args: Any, **kwargs: Any) -> None:
        made.append(weakref.ref(cache))
        build(cache, *args, **kwargs)

    monkeypatch.setattr(CognexisCache, "__init__", note)
    nan = [lambda input_ids, scores: scores * (NAN if input_ids.shape[1] > 6 else 1.0)]
    for _ in range(3):
        for way in ("by default", "static cache", "one loop drafts", "prompt lookup"):
            greedy(model, ids, num_loops=4, **WAYS[way](model))
            with pytest.raises(NonFiniteError):
                greedy(model, ids, num_loops=4, logits_processor=nan, **WAYS[way](model))
    assert len(made) >= 24
    gc.collect()
    assert [ref for ref in made if ref() is not None] == []


def test_a_failed_generation_does_not_harm_the_next(model: Any, ids: Tensor) -> None:
    expected = most_likely(model, ids, 4)
    weight = model.model.final_norm.weight
    healthy = weight.data.clone()
    for way in ("static cache", "one loop drafts", "by default"):
        weight.data[3] = NAN
        with pytest.raises(NonFiniteError):
            greedy(model, ids, num_loops=4, **WAYS[way](model))
        weight.data.copy_(healthy)
        assert torch.equal(greedy(model, ids, num_loops=4, **WAYS[way](model)), expected)


# -- nothing is left behind ----------------------------------------------------------------------------------------


def snapshot(model: Any) -> tuple[Any, Any, Any]:
    return model.config.to_dict(), model.generation_config.to_dict(), model.config.num_hidden_layers


@pytest.mark.parametrize("way", list(WAYS))
def test_generate_leaves_both_configurations_as_they_were(model: Any, ids: Tensor, way: str) -> None:
    before = snapshot(model)
    model.generate(ids, num_loops=2, **{"max_new_tokens": 3, "return_loop_stats": True} | WAYS[way](model))
    assert snapshot(model) == before


def test_generate_leaves_a_given_generation_config_as_it_was(model: Any, ids: Tensor) -> None:
    given = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.0, num_loops=2, pad_token_id=PAD)
    before = given.to_dict()
    model.generate(ids, generation_config=given)
    assert given.to_dict() == before


def on_draft(model: Any, call: Callable[[], None]) -> Any:
    """Call ``call`` before every pass of one loop, which beside passes of four is a draft; returns the hook."""
    core = model.model.recurrent
    return core.register_forward_pre_hook(lambda _, args: call() if args[1] == 1 else None)


def test_an_exception_while_drafting_leaves_the_configuration_as_it_was(model: Any, ids: Tensor) -> None:
    def fail() -> None:
        raise OSError("interrupted")

    before = snapshot(model)
    hook = on_draft(model, fail)
    with pytest.raises(OSError, match="interrupted"):
        greedy(model, ids, num_loops=4, assistant_early_exit=4)
    hook.remove()
    assert snapshot(model) == before
    assert model.config.loop_cap is None
    assert torch.equal(greedy(model, ids, num_loops=4), most_likely(model, ids, 4))


def test_threads_with_different_loop_counts_do_not_disturb_each_other(model: Any) -> None:
    prompts = token_ids(model, 2, 5)
    expected = [most_likely(model, prompts[:1], 1), most_likely(model, prompts[1:], 4)]
    barrier = threading.Barrier(2, timeout=60)

    def step_together(input_ids: Tensor, scores: Tensor) -> Tensor:
        barrier.wait()
        return scores

    results = run_together(
        lambda: greedy(model, prompts[:1], num_loops=1, logits_processor=[step_together]),
        lambda: greedy(model, prompts[1:], num_loops=4, logits_processor=[step_together]),
    )
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_prompt_of_invalid_ids_is_refused_before_any_forward(model: Any) -> None:
    for bad in (64, -1, 10**6):
        with counted_loops(model) as applications, pytest.raises(InvalidTokenIdError) as caught:
            model.generate(torch.tensor([[3, bad, 5]]), max_new_tokens=2)
        assert (caught.value.token_id, applications) == (bad, [])


def test_a_tokenizer_that_is_not_the_models_is_refused_wherever_generate_sees_it():
    tokenizer = byte_reference_tokenizer()
    model = tiny_model(tiny_config(vocab_size=len(tokenizer), tokenizer_checksum="sha256:" + "0" * 64))
    ids = torch.tensor([[0, 20, 30]])
    for keywords in ({"tokenizer": tokenizer, "stop_strings": "x"}, {"streamer": TextStreamer(tokenizer)}):
        with pytest.raises(ArtifactMismatchError, match="sha256:0000"):
            model.generate(ids, max_new_tokens=2, **keywords)
    model.config.tokenizer_checksum = tokenizer.checksum
    assert model.generate(ids, max_new_tokens=2, tokenizer=tokenizer, stop_strings="x").shape[0] == 1
