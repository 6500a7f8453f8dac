"""The tokenizer: lossless, repeatable, with fixed control ids, and loadable by stock transformers."""

import hashlib
import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.errors import InvalidConfigError, TokenizerError
from cognexis.tokens.layout import BYTE_TOKENS, CONTROL_TOKENS
from tests.batteries.small_tokenizers import small_tokenizer
from tests.batteries.without_package import run_without_package

VOCAB_SIZE = 700
TEXTS = [inspect.getsource(module) for module in (hashlib, inspect, json)]

FIXTURES = {
    "python": 'def f(x: int = 10) -> str:\n\tif x >= 2**31:\n\t\treturn f"{x!r:>8}"\n\n\n    # done\n',
    "rust": 'fn main() {\n    let v: Vec<u8> = vec![0xFF; 4];\n    println!("{:?}", &v[..2]);\n}\n',
    "json": '{"a": [1, 2.5e-3, null], "b": {"c": "\\u00e9\\n"}}',
    "markdown": "# Title  \n\n```python\n>>> 1 + 1\n2\n```\n\n* item\n  * nested | table |\n",
    "crlf": "one\r\ntwo\r\n\r\n\tthree\r\n",
    "carriage_returns": "\r\r \r\n\r",
    "spaces": "   ",
    "one_space": " ",
    "mixed_white_space": " \t \n \x0b\x0c \u00a0\u2003\u3000\u2028 ",
    "inner_spaces": "a  b   c 1  2   3 \n",
    "emoji": "👩‍👩‍👧 🏳️‍🌈 ok 🙂",
    "scripts": "Σίσυφος ทดสอบ 日本語テキスト עִבְרִית हिन्दी",
    "combining": "e\u0301 a\u0308\u0323",
    "nul_and_controls": "a\x00b\x1f\x7f\x85",
    "byte_piece_look_alike": "<0x0A><0x41> <0xZZ>",
    "control_look_alike": "<|system|>\nx</s><s> <eod><|end|>",
    "not_normalised": "ﬁ ① Ｆｕｌｌ ² Å",
    "empty": "",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, VOCAB_SIZE)


def encode_as_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.mark.parametrize("text", FIXTURES.values(), ids=FIXTURES)
def test_fixture_round_trips(tokenizer, text):
    assert tokenizer.decode(encode_as_text(tokenizer, text)) == text


@settings(max_examples=300)
@given(text=st.text())
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(encode_as_text(tokenizer, text)) == text


@settings(max_examples=100)
@given(parts=st.lists(st.sampled_from([*"<0xA1>|s/ \t\r\n", *CONTROL_TOKENS, "<0x0A>", "end", "  "])))
def test_text_that_looks_like_tokens_round_trips_without_control_ids(tokenizer, parts):
    text = "".join(parts)
    ids = encode_as_text(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=len(CONTROL_TOKENS)) >= len(CONTROL_TOKENS)


@given(text=st.text())
def test_stock_encoding_round_trips_with_one_bos(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]


def test_vocabulary_has_the_requested_size_and_layout(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE
    assert tuple(tokenizer.convert_ids_to_tokens(range(266))) == CONTROL_TOKENS + BYTE_TOKENS


def test_control_tokens_have_their_fixed_ids(tokenizer):
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    assert [getattr(tokenizer, name) for name in names] == [0, 1, 2, 3]
    assert sorted(tokenizer.all_special_ids) == list(range(10))
    for index, token in enumerate(CONTROL_TOKENS):
        assert tokenizer.encode(token, add_special_tokens=False) == [index]
        assert tokenizer.decode([index], skip_special_tokens=True) == ""


def test_model_alone_never_spells_a_control_token(tokenizer):
    words = tokenizer.backend_tokenizer.pre_tokenizer
    for token in CONTROL_TOKENS + BYTE_TOKENS:
        assert len(words.pre_tokenize_str(token)) > 1


def test_no_text_needs_the_unknown_token(tokenizer):
    for text in FIXTURES.values():
        assert tokenizer.unk_token_id not in encode_as_text(tokenizer, text)


def test_digits_are_split_one_by_one(tokenizer):
    ids = tokenizer.encode("x = 1234567890 + v22", add_special_tokens=False)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("123456789022")


def test_space_stays_with_the_word_after_it_and_indentation_with_the_line_break(tokenizer):
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("if  a_b:\n\n        return -x1 \n")
    assert [word for word, _ in words] == ["if", " ", " a_b", ":", "\n\n        ", "return", " -", "x", "1", " \n"]


def test_training_twice_gives_the_same_file():
    first, second = (train_tokenizer(TEXTS, VOCAB_SIZE).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer_type", ["sentencepiece", "bpe"])
def test_two_processes_train_the_same_tokenizer(tokenizer_type, tmp_path):
    script = (
        "import hashlib, inspect, json, sys\n"
        "from cognexis.artifacts.tokenizer_training import train_tokenizer\n"
        "texts = [inspect.getsource(module) for module in (hashlib, inspect, json)]\n"
        "print(json.dumps(train_tokenizer(texts, 700, tokenizer_type=sys.argv[1]).checksum))\n"
    )
    found = {
        run_without_package(script, tokenizer_type, hf_home=tmp_path, has_package=True, PYTHONHASHSEED=seed)
        for seed in ("1", "2")
    }
    assert found == {train_tokenizer(TEXTS, VOCAB_SIZE, tokenizer_type=tokenizer_type).checksum}


@pytest.mark.parametrize("text", FIXTURES.values(), ids=FIXTURES)
@pytest.mark.parametrize("tokenizer_type", ["bpe", "byte_reference"])
def test_fixture_round_trips_for_the_other_types(tokenizer_type, text):
    other = small_tokenizer(tokenizer_type)
    ids = other.encode_untrusted(text, add_bos=False)
    assert other.decode(ids) == text
    assert min(ids, default=len(CONTROL_TOKENS)) >= len(CONTROL_TOKENS)
    digits = [token for token in other.convert_ids_to_tokens(ids) if any(map(str.isdigit, token))]
    assert all(len(token) == 1 or token.startswith("<0x") for token in digits)


def test_byte_pair_vocabulary_has_the_same_layout():
    other = small_tokenizer("bpe")
    assert len(other) == VOCAB_SIZE
    assert tuple(other.convert_ids_to_tokens(range(266))) == CONTROL_TOKENS + BYTE_TOKENS
    words = other.backend_tokenizer.pre_tokenizer
    for token in CONTROL_TOKENS + BYTE_TOKENS:
        assert len(words.pre_tokenize_str(token)) > 1


def test_endless_word_is_cut(tokenizer):
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x" * 300)
    assert [len(word) for word, _ in words] == [128, 128, 44]


def test_unknown_type_is_refused():
    with pytest.raises(InvalidConfigError, match="tokenizer_type='wordpiece': must be one of sentencepiece, bpe"):
        train_tokenizer(TEXTS, VOCAB_SIZE, tokenizer_type="wordpiece")


def test_order_of_the_texts_does_not_matter(tokenizer):
    other = train_tokenizer(iter(reversed(TEXTS)), VOCAB_SIZE)
    assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_rare_characters_are_spelled_in_bytes():
    texts = [*TEXTS, "Ж"]
    assert "Ж" not in train_tokenizer(texts, VOCAB_SIZE).get_vocab()
    assert "Ж" in train_tokenizer(texts, VOCAB_SIZE, character_coverage=1.0).get_vocab()


def test_auto_tokenizer_loads_the_saved_files(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in FIXTURES.values():
        assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.padding_side == "left"
    assert loaded.model_input_names == ["input_ids", "attention_mask"]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.all_special_ids == tokenizer.all_special_ids
    assert isinstance(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), Tokenizer)


def test_batch_is_padded_on_the_left(tokenizer):
    batch = tokenizer(["a b c d", "a"], padding=True)
    assert batch["input_ids"][1][: batch["attention_mask"][1].count(0)] == [2] * batch["attention_mask"][1].count(0)
    assert set(batch) == {"input_ids", "attention_mask"}


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say hi\n"},
    {"role": "assistant", "content": "hi"},
    {"role": "tool", "content": "{}"},
    {"role": "assistant", "content": "bye"},
]


def test_chat_template_renders_exactly(tokenizer):
    expected = (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nSay hi\n<|end|>\n<|assistant|>\nhi<|end|>\n"
        "<|tool|>\n{}<|end|>\n<|assistant|>\nbye<|end|>\n"
    )
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>\nBe brief.<|end|>\n<|user|>\nSay hi\n<|end|>\n<|assistant|>\n"


def test_chat_template_marks_what_the_assistant_says(tokenizer):
    chat = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mask in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "hi<|end|>bye<|end|>"


@pytest.mark.parametrize(
    "messages, match",
    [([], "at least one message"), ([{"role": "robot", "content": ""}], "unknown role 'robot' in message 0")],
)
def test_chat_template_refuses_bad_chats(tokenizer, messages, match):
    with pytest.raises(InvalidConfigError, match=match):
        tokenizer.apply_chat_template([CHAT, messages], tokenize=False)


def test_vocabulary_without_room_for_the_fixed_part_is_refused():
    with pytest.raises(InvalidConfigError, match=r"vocab_size must be at least 3\d\d .*, got 300"):
        train_tokenizer(TEXTS, 300)


def test_text_too_short_for_the_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="give more text or a smaller vocab_size"):
        train_tokenizer(["a few words"], 5000)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_refused(texts):
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer(texts, VOCAB_SIZE)


@pytest.mark.parametrize(
    "setting", [{"max_piece_length": 0}, {"character_coverage": 0.0}, {"character_coverage": 2.0}]
)
def test_setting_out_of_range_is_refused(setting):
    (name,) = setting
    with pytest.raises(InvalidConfigError, match=name):
        train_tokenizer(TEXTS, VOCAB_SIZE, **setting)
