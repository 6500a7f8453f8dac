"""Tokenizer and model: what must agree, and that every difference is named with both values."""

import copy
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from cognexis.errors import ArtifactMismatchError
from cognexis.tokens import match as module
from cognexis.tokens.match import check_tokenizer_match, tokenizer_checksum
from tests.batteries.small_tokenizers import small_tokenizer
from tests.batteries.tiny import tiny_config

OTHER = "sha256:" + "0" * 64


@pytest.fixture
def tokenizer():
    return small_tokenizer()


def test_own_tokenizer_matches(tokenizer):
    config = tiny_config(vocab_size=700, tokenizer_checksum=tokenizer.checksum)
    check_tokenizer_match(config, tokenizer)
    check_tokenizer_match(tiny_config(vocab_size=704), tokenizer, generation_config=config)
    check_tokenizer_match(tiny_config(vocab_size=700, eos_token_id=[9, 1]), tokenizer)
    check_tokenizer_match(tiny_config(vocab_size=700, pad_token_id=None), tokenizer)


def test_checksum_is_that_of_the_backend_whatever_the_class(tokenizer):
    stock = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert tokenizer_checksum(stock) == tokenizer.checksum
    assert tokenizer_checksum(SimpleNamespace()) is None
    check_tokenizer_match(tiny_config(vocab_size=700, tokenizer_checksum=tokenizer.checksum), stock)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tokenizer_checksum": OTHER}, f"trained with tokenizer {OTHER}, this one is sha256:"),
        ({"vocab_size": 699}, "700 ids and the model 699"),
        ({"bos_token_id": 5}, "bos_token_id is 5 in the configuration, 0 in the tokenizer"),
        ({"eos_token_id": [9, 4]}, r"eos_token_id is \[9, 4\] in the configuration, 1 in the tokenizer"),
    ],
)
def test_difference_is_refused_or_warned_about(tokenizer, settings, match, monkeypatch):
    config = tiny_config(**{"vocab_size": 700, **settings})
    with pytest.raises(ArtifactMismatchError, match=match):
        check_tokenizer_match(config, tokenizer)
    warnings = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    check_tokenizer_match(config, tokenizer, allow_tokenizer_mismatch=True)
    assert len(warnings) == 1


def test_generation_configuration_is_compared_too(tokenizer):
    generation = SimpleNamespace(eos_token_id=7, bos_token_id=None, pad_token_id=2)
    with pytest.raises(ArtifactMismatchError, match="eos_token_id is 7 in the generation configuration"):
        check_tokenizer_match(tiny_config(vocab_size=700), tokenizer, generation_config=generation)


def test_added_tokens_beyond_the_embedding_are_refused(tokenizer):
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<|new|>"])
    config = tiny_config(vocab_size=700, tokenizer_checksum=tokenizer.checksum)
    with pytest.raises(ArtifactMismatchError, match=r"this one is sha256:.*701 ids and the model 700"):
        check_tokenizer_match(config, grown)
