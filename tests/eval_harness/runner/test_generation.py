"""Generated answers beside plain calls of generate, and what they are counted to cost."""

import pytest
import torch

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.artifacts.shipped_tokenizer import load_default_tokenizer
from cognexis.eval_harness.compute import generation_flops
from cognexis.eval_harness.runner.encoding import encode_examples
from cognexis.eval_harness.runner.execution import Deadline
from cognexis.eval_harness.runner.generation import run_generations
from cognexis.eval_harness.runner.loop_run import LoopRun
from cognexis.eval_harness.tasks.protocol import Example, Generation

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return load_default_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(2)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CognexisConfig(
        vocab_size=len(tokenizer), num_prelude_blocks=1, num_coda_blocks=1, trained_max_loops=4, **SHAPE, **ids
    )
    return CognexisForCausalLM(config).eval().double()


def run_all(model, tokenizer, requests, run, batch_size=4, seed=0):
    examples = encode_examples([Example(str(n), request) for n, request in enumerate(requests)], tokenizer, 256)
    return run_generations(model, tokenizer, examples, run, batch_size, Deadline(60), seed), examples


def fixed(depth, **limits):
    return LoopRun("fixed", depth, {"num_loops": depth}, limits)


def test_batches_of_prompts_give_what_single_calls_give(model, tokenizer):
    requests = [Generation(text, max_new_tokens=5) for text in ("one", "a much longer prompt than that", "three four")]
    found, examples = run_all(model, tokenizer, requests, fixed(3))
    total = 0
    for answers, encoded in zip(found.predictions, examples, strict=True):
        ids = torch.tensor([encoded.prompt])
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_loops=3, max_new_tokens=5, do_sample=False
        )
        new = alone[0, ids.shape[1] :]
        assert answers == [tokenizer.decode(new, skip_special_tokens=True)]
        total += generation_flops(model.config, len(encoded.prompt), [3] * len(new)).total
    assert found.flops.total == total and set(found.loops) == {3} and found.halts == {"max_loops": len(found.loops)}
    assert found.num_tokens == len(found.loops) and len(found.batch_ms) == len(found.prefill_ms) == 1
    longest = max(len(encoded.prompt) for encoded in examples) + 5 - 1
    slots = model.config.first_loop_slot + 3
    assert found.cache_bytes == 2 * slots * model.config.num_key_value_heads * model.config.head_dim * longest * 8


def test_requests_of_other_settings_do_not_share_a_batch(model, tokenizer):
    requests = [
        Generation("one", max_new_tokens=2),
        Generation("two", max_new_tokens=3),
        Generation("x", max_new_tokens=3),
    ]
    found, _ = run_all(model, tokenizer, requests, fixed(1))
    assert len(found.batch_ms) == 2 and len(found.predictions) == 3


def test_samples_follow_the_seed_whatever_else_draws(model, tokenizer):
    request = Generation("one", max_new_tokens=6, num_samples=3, temperature=1.0)
    torch.manual_seed(1)
    first, _ = run_all(model, tokenizer, [request], fixed(2), seed=5)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    again, _ = run_all(model, tokenizer, [request], fixed(2), seed=5)
    other, _ = run_all(model, tokenizer, [request], fixed(2), seed=6)
    assert first.predictions == again.predictions != other.predictions
    assert len(set(first.predictions[0])) > 1
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_answers_end_before_the_first_stop(model, tokenizer):
    plain, _ = run_all(model, tokenizer, [Generation("one", max_new_tokens=6)], fixed(1))
    text = plain.predictions[0][0]
    assert len(text) > 2
    cut, _ = run_all(model, tokenizer, [Generation("one", max_new_tokens=6, stop=(text[2],))], fixed(1))
    assert cut.predictions[0][0] == text[: text.index(text[2])]


def test_a_request_without_room_for_a_token_is_exhausted_and_the_others_run(model, tokenizer):
    limits = {"max_recurrent_flops": 200_000}
    requests = [Generation("one", max_new_tokens=2), Generation("many words " * 20, max_new_tokens=2)]
    found, _ = run_all(model, tokenizer, requests, fixed(4, **limits))
    assert found.predictions[1] == [""] and found.predictions[0] != [""] and found.exhausted >= 1
    assert found.violations == 0


def test_adaptive_tokens_are_counted_one_by_one(model, tokenizer):
    never = {"type": "rule_based", "min_delta": 0.0}
    keywords = {"loop_mode": "adaptive_token", "scheduler": never, "max_loops": 3}
    requests = [Generation("one two", max_new_tokens=4)]
    found, _ = run_all(model, tokenizer, requests, LoopRun("adaptive_token", 3, keywords))
    plain, _ = run_all(model, tokenizer, requests, fixed(3))
    assert found.predictions == plain.predictions and found.loops == plain.loops == [3] * 4
    assert found.flops == plain.flops
    always = {**keywords, "scheduler": {"type": "rule_based", "min_delta": 1e9}}
    shallow, _ = run_all(model, tokenizer, requests, LoopRun("adaptive_token", 3, always))
    assert shallow.loops == [1] * 4 and shallow.halts == {"min_delta": 4} and shallow.histogram() == [0, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be 1 or more"),
        ({"num_samples": 2}, "temperature=0: must be above 0"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0 or more"),
        ({"stop": ("",)}, "must be texts"),
    ],
)
def test_requests_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Generation("x", **settings)
