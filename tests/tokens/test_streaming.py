"""Streaming: any text token by token is what decoding the whole gives, and nothing is ever taken back."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cognexis.errors import InvalidConfigError, InvalidTokenIdError, TokenizerError
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.tokens.streaming import TokenStreamDecoder
from tests.batteries.small_tokenizers import TYPES, small_tokenizer

RULES = st.fixed_dictionaries(
    {},
    optional={
        "stop_at_eos": st.booleans(),
        "skip_padding": st.booleans(),
        "show_special": st.sampled_from([None, False]),
        "skip_special_tokens": st.booleans(),
    },
)


def test_two_byte_character_comes_when_it_is_whole():
    stream = small_tokenizer("byte_reference").stream_decoder()
    assert [stream.push(216), stream.push(173)] == ["", "Σ"]
    assert [stream.push(216), stream.finish(), stream.push(11)] == ["", "\ufffd", ""] or stream.is_finished


@settings(max_examples=300)
@given(text=st.text(), tokenizer_type=st.sampled_from(TYPES))
def test_stream_of_a_text_is_the_text(text, tokenizer_type):
    tokenizer = small_tokenizer(tokenizer_type)
    stream = TokenStreamDecoder(tokenizer)
    given_so_far = ""
    for token_id in tokenizer.encode_untrusted(text, add_bos=False):
        given_so_far += stream.push(token_id)
        assert text.startswith(given_so_far)
    assert given_so_far + stream.finish() == text


@settings(max_examples=500)
@given(data=st.data(), rules=RULES, tokenizer_type=st.sampled_from(TYPES))
def test_stream_of_any_ids_is_decode_of_them(data, rules, tokenizer_type):
    tokenizer = small_tokenizer(tokenizer_type)
    near = st.integers(0, 300).filter(lambda token_id: token_id < len(tokenizer))
    ids = data.draw(st.lists(st.one_of(near, st.integers(0, len(tokenizer) - 1)), max_size=30))
    whole = tokenizer.decode(ids, **rules)
    stream = tokenizer.stream_decoder(**rules)
    parts = [stream.push(token_id) for token_id in ids]
    for end in range(len(parts) + 1):
        assert whole.startswith("".join(parts[:end]))
    assert "".join(parts) + stream.finish() == whole


def test_end_padding_and_special_tokens_follow_the_rules():
    tokenizer = small_tokenizer("byte_reference")
    stream = tokenizer.stream_decoder(stop_at_eos=True)
    assert "".join(map(stream.push, [2, 0, 107, 1, 108])) == "<s>a" and stream.is_finished
    assert stream.finish() == ""
    hidden = tokenizer.stream_decoder(skip_special_tokens=True)
    assert "".join(map(hidden.push, [0, 107, 9, 1])) == "a"


def test_streams_do_not_share_state():
    tokenizer = small_tokenizer("byte_reference")
    first, second = tokenizer.stream_decoder(), tokenizer.stream_decoder()
    assert first.push(216) == second.push(107)[:0] == ""
    assert first.push(173) == "Σ" and second.finish() == ""


def test_bad_ids_and_rules_are_refused():
    tokenizer = small_tokenizer("byte_reference")
    stream = tokenizer.stream_decoder()
    for wrong in (266, -1, 1.0, "a", True):
        with pytest.raises(InvalidTokenIdError):
            stream.push(wrong)
    with pytest.raises(InvalidConfigError, match="contradicts"):
        tokenizer.stream_decoder(skip_special_tokens=True, show_special=True)


def test_added_tokens_can_be_streamed():
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.stream_decoder()
    tokenizer.add_tokens(["Ω!"])
    assert tokenizer.stream_decoder().push(700) == "Ω!"


def test_decoder_of_another_kind_is_refused():
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = CognexisTokenizer(tokenizer_object=backend)
    assert tokenizer.decode([0]) == "a"
    with pytest.raises(TokenizerError, match="lossless decoder"):
        tokenizer.stream_decoder()
