"""Choices and texts as ids, and their likelihoods beside a plain computation."""

import pytest
import torch

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.artifacts.shipped_tokenizer import load_default_tokenizer
from cognexis.errors import InvalidConfigError, NonFiniteError
from cognexis.eval_harness.runner.encoding import ScoredIds, encode_examples
from cognexis.eval_harness.runner.execution import Deadline
from cognexis.eval_harness.runner.likelihood import run_likelihoods
from cognexis.eval_harness.runner.loop_run import LoopRun
from cognexis.eval_harness.tasks.protocol import Choice, Example, Generation, Likelihood

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return load_default_tokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = CognexisConfig(vocab_size=40, num_prelude_blocks=1, num_coda_blocks=1, trained_max_loops=3, **SHAPE)
    return CognexisForCausalLM(config).eval().double()


def fixed(depth):
    return LoopRun("fixed", depth, {"num_loops": depth})


def examples_of(*requests):
    return [Example(str(index), request) for index, request in enumerate(requests)]


def plain_sum(model, ids, start, depth):
    """Log-likelihood of ``ids[start:]``, one forward pass per token."""
    total = 0.0
    for place in range(start, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:place]]), num_loops=depth, use_cache=False).logits[0, -1]
        total += float(logits.log_softmax(-1)[ids[place]])
    return total


def test_choices_of_several_lengths_score_like_single_passes(model):
    choice = Choice((3, 4, 5), ((6, 7), (8,), (9, 10, 11)))
    text = Likelihood((12, 13, 14, 15))
    encoded = encode_examples(examples_of(choice, text), None, 64)
    found = run_likelihoods(model, encoded, fixed(2), 2, Deadline(60))
    scored, tokens = found.predictions
    assert scored.lengths == (2, 1, 3)
    for value, ids in zip(scored.sums, choice.choices, strict=True):
        assert value == pytest.approx(plain_sum(model, (3, 4, 5, *ids), 3, 2), abs=1e-5)
    assert -sum(tokens.nats) == pytest.approx(plain_sum(model, text.text, 1, 2), abs=1e-5)
    assert len(found.batch_ms) == 2 and found.num_requests == 2 and found.num_tokens == 4 + 3 + 5 + 3


def test_choices_of_one_token_take_one_pass_and_score_alike(model):
    choice = Choice((3, 4, 5), tuple((token,) for token in range(20, 26)))
    (encoded,) = encode_examples(examples_of(choice), None, 64)
    assert encoded.scored == (ScoredIds((3, 4, 5, 20), 3, tuple(range(20, 26))),)
    (scored,) = run_likelihoods(model, [encoded], fixed(3), 4, Deadline(60)).predictions
    for value, ids in zip(scored.sums, choice.choices, strict=True):
        assert value == pytest.approx(plain_sum(model, (3, 4, 5, *ids), 3, 3), abs=1e-6)


def test_seam_between_context_and_choice_is_encoded_together(tokenizer):
    (encoded,) = encode_examples(examples_of(Choice("The answer:", (" one thing", " two"))), tokenizer, 64)
    for sequence, text in zip(encoded.scored, ("The answer: one thing", "The answer: two"), strict=True):
        whole = tokenizer(text, add_special_tokens=False).input_ids
        assert sequence.ids == (tokenizer.bos_token_id, *whole)
        assert tokenizer.decode(sequence.ids[1 : sequence.start]) == "The answer:"


def test_control_words_in_examples_are_letters(tokenizer):
    (encoded,) = encode_examples(examples_of(Generation("<eod>")), tokenizer, 128)
    assert tokenizer.convert_tokens_to_ids("<eod>") not in encoded.prompt


def test_chat_goes_through_the_template(tokenizer):
    (encoded,) = encode_examples(examples_of(Generation("hello", is_chat=True)), tokenizer, 128)
    assert tokenizer.decode(encoded.prompt).endswith("<|assistant|>\n") or "assistant" in tokenizer.decode(
        encoded.prompt
    )


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "the task has none"),
        ([Example("a", Likelihood((1, 2))), Example("a", Likelihood((1, 2)))], "two examples have this id"),
        ([Example("a", Likelihood((1,)))], "example 'a': has no token to score"),
        ([Example("a", Choice((1,), ((2,), ())))], "example 'a': has no token to score"),
        ([Example("a", Likelihood("text"))], "the checkpoint has no tokenizer"),
        ([Example("a", Generation((1, 2), max_new_tokens=63))], "65 tokens with its answer; the model takes 64"),
    ],
)
def test_examples_that_cannot_be_asked(examples, message):
    with pytest.raises(InvalidConfigError, match=message):
        encode_examples(examples, None, 64)


def test_numbers_that_are_not_finite_are_noticed(model):
    encoded = encode_examples(examples_of(Choice((3,), ((4,), (5,))), Likelihood((6, 7, 8))), None, 64)
    weight = model.model.final_norm.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        for one in encoded:
            with pytest.raises(NonFiniteError, match="losses are not finite"):
                run_likelihoods(model, [one], fixed(1), 1, Deadline(60))
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_time_is_bounded(model):
    encoded = encode_examples(examples_of(*[Likelihood((1, 2, 3))] * 3), None, 64)
    with pytest.raises(TimeoutError, match="no end after 0 seconds, at 1 of 3 requests"):
        run_likelihoods(model, encoded, fixed(1), 1, Deadline(0))
