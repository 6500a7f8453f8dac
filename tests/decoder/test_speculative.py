"""Self-speculation gives what plain decoding gives: the same greedy tokens, the same distribution of sampled ones."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cognexis import CognexisCache, CognexisConfig, CognexisForCausalLM
from cognexis.decoder.speculative import _judge
from cognexis.decoder.streaming import StepEventStreamer
from cognexis.errors import InvalidConfigError

CHECKPOINT = Path(__file__).parents[2] / "hub_assets" / "windowed_parity"
LOOPS = 6
MODELS = {
    "full attention": {},
    "sliding window": {
        "prelude_layer_types": ["sliding_attention"],
        "core_layer_types": ["sliding_attention"],
        "coda_layer_types": ["sliding_attention"],
        "sliding_window": 4,
    },
    "two core blocks": {"num_recurrent_blocks": 2, "experimental_multi_block": True},
    "gate, random start": {"recurrent_gating": True, "recurrent_init": "random"},
}


def build(vocab_size: int = 40, **fields: object) -> CognexisForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    config = CognexisConfig.from_variant(
        "cognexis-tiny", vocab_size=vocab_size, head_dim=8, initializer_range=0.4, **sizes, **fields
    )
    return CognexisForCausalLM(config).double().eval()


def prompt(rows: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (rows, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :3] = 0  # padding on the left
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("draft", "tokens"), [(1, 4), (3, 1), (5, 7)])
def test_greedy_tokens_are_those_of_plain_decoding(fields, draft, tokens):
    model = build(**fields)
    settings = prompt() | {"num_loops": LOOPS, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**settings, eos_token_id=9)
    fast = model.generate(**settings, eos_token_id=9, speculative_draft_loops=draft, speculative_tokens=tokens)
    assert fast.equal(plain)


def test_processors_see_the_prefix_of_each_drafted_token():
    model = build()
    settings = prompt() | {"num_loops": LOOPS, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    settings |= {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2}
    assert model.generate(**settings, speculative_draft_loops=2).equal(model.generate(**settings))


def test_statistics_count_drafts_and_verifications():
    model = build()
    settings = prompt(rows=1) | {"num_loops": LOOPS, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    result = model.generate(**settings, speculative_draft_loops=2, speculative_tokens=4, return_loop_stats=True)
    facts = result.loop_diagnostics["speculation"]
    assert (result.loop_counts == LOOPS).all() and result.loop_counts.shape == (1, 16)
    assert result.stop_reasons == ["max_new_tokens"]
    assert 4 <= facts["rounds"] <= 16 and 0 <= facts["acceptance_rate"] <= 1
    # prompt, then per round at most four drafts of two loops and one verification of the other four
    assert result.budget_used[0] <= LOOPS + facts["rounds"] * (4 * 2 + LOOPS - 2)
    assert result.budget_used[0] >= LOOPS + facts["rounds"] * (2 + LOOPS - 2)


def test_streamer_gets_every_token_once():
    model = build()
    streamer = StepEventStreamer()
    settings = prompt(rows=1) | {"num_loops": LOOPS, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    ids = model.generate(**settings, speculative_draft_loops=1, streamer=streamer)
    assert [event.token_id for event in streamer.events] == ids[0, 6:].tolist()
    assert {event.loop_count for event in streamer.events} == {LOOPS}
    assert streamer.events[-1].stop_reason == "max_new_tokens"


def test_cache_goes_on_after_the_draft_is_taken_back():
    model = build()
    settings = prompt(rows=1) | {"num_loops": LOOPS, "do_sample": False, "pad_token_id": 0}
    first = model.generate(
        **settings, max_new_tokens=11, speculative_draft_loops=1, speculative_tokens=5, return_dict_in_generate=True
    )
    cache = first.past_key_values
    assert isinstance(cache, CognexisCache)
    assert {int(layer.get_seq_length()) for layer in cache.layers if layer.is_initialized} == {6 + 11 - 1}
    logits = model(first.sequences[:, -1:], past_key_values=cache, num_loops=LOOPS).logits[:, -1]
    whole = model(first.sequences, num_loops=LOOPS).logits[:, -1]
    torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)


def test_judged_drafts_follow_the_distribution_of_the_verification():
    """Exact expectation: kept drafts and their replacements together are distributed as p."""
    generator = torch.Generator().manual_seed(0)
    scores, draft_scores = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    q = draft_scores.softmax(-1)
    rows = 200_000
    torch.manual_seed(0)
    drafts = torch.multinomial(q[0], rows, replacement=True)
    kept, instead = _judge(scores.expand(rows, 5), drafts, q.expand(rows, 5), samples=True)
    counts = torch.where(kept, drafts, instead).bincount(minlength=5).double()
    expected = scores.softmax(-1)[0] * rows
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 0.1 % of chi-square with 4 degrees of freedom


def test_sampled_tokens_are_distributed_as_in_plain_decoding():
    model = build(vocab_size=6).float()
    ids = torch.tensor([[1, 4, 2]]).repeat(6000, 1)
    settings = {"num_loops": LOOPS, "max_new_tokens": 3, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(2)
    plain = model.generate(ids, **settings)[:, 3:]
    fast = model.generate(ids, **settings, speculative_draft_loops=1, speculative_tokens=3)[:, 3:]
    assert not fast.equal(plain)
    weights = torch.tensor([36, 6, 1])
    a, b = ((x * weights).sum(1).bincount(minlength=216).double() for x in (plain, fast))
    seen = (a + b) >= 20
    a, b = (torch.cat((x[seen], x[~seen].sum()[None])) for x in (a, b))
    statistic = ((a - b) ** 2 / (a + b).clamp(min=1)).sum().item()
    freedom = len(a) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"speculative_tokens": 4}, "needs speculative_draft_loops"),
        ({"speculative_draft_loops": 0}, "speculative_draft_loops=0"),
        ({"speculative_draft_loops": LOOPS}, "must be below num_loops=6"),
        ({"speculative_draft_loops": 2, "speculative_tokens": 0}, "speculative_tokens=0"),
        ({"speculative_draft_loops": 2, "num_beams": 2}, "num_beams"),
        ({"speculative_draft_loops": 2, "max_total_loops": 50}, "budgets"),
        ({"speculative_draft_loops": 2, "cache_policy": "last_exited"}, "fixed number of loops"),
        ({"speculative_draft_loops": 2, "output_scores": True}, "output_scores"),
        ({"speculative_draft_loops": 2, "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"speculative_draft_loops": 2, "cache_implementation": "static"}, "dynamic"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(settings, words):
    model = build()
    with pytest.raises(InvalidConfigError, match=words):
        model.generate(**prompt(), num_loops=LOOPS, max_new_tokens=4, pad_token_id=0, **settings)


def test_adaptive_modes_and_attention_memory_are_refused():
    with pytest.raises(InvalidConfigError, match="fixed number of loops"):
        build().generate(**prompt(), loop_mode="adaptive_token", speculative_draft_loops=2, max_new_tokens=4)
    with pytest.raises(InvalidConfigError, match="attention memory"):
        build(input_injection="attention_memory").generate(
            **prompt(), num_loops=LOOPS, speculative_draft_loops=2, max_new_tokens=4
        )


@pytest.mark.slow
def test_a_thousand_greedy_tokens_of_a_trained_model_are_equal():
    model = CognexisForCausalLM.from_pretrained(CHECKPOINT).eval()
    ids = torch.tensor([[2, 0, 1, 1, 0, 1, 0, 0, 1]])
    settings = {"num_loops": 6, "max_new_tokens": 1000, "do_sample": False, "pad_token_id": 3}
    plain = model.generate(ids, **settings)
    fast = model.generate(ids, **settings, speculative_draft_loops=2, speculative_tokens=4, return_loop_stats=True)
    assert plain.shape == (1, 1009) and fast.sequences.equal(plain)
