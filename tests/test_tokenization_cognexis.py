"""The tokenizer class: its call, decoding, untrusted text, threads, copies, files; for all three types."""

import copy
import json
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cognexis import CognexisForCausalLM, CognexisTokenizer
from cognexis.errors import ArtifactMismatchError, InvalidConfigError, InvalidTokenIdError, TokenizerError
from cognexis.tokens.layout import CONTROL_TOKENS
from tests.batteries.small_tokenizers import TYPES, small_tokenizer
from tests.batteries.tiny import tiny_config, tiny_model
from tests.batteries.without_package import put_in_hub_cache, run_without_package

BOS, EOS, PAD = 0, 1, 2
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",
    "  \t",
    "Σ 日本 👩‍👩‍👧",
    "a  b\r\n\r\n",
    "12 3456",
    "\x00<|END|>＜|end|＞",
]


@pytest.fixture(params=TYPES)
def tokenizer(request) -> CognexisTokenizer:
    return small_tokenizer(request.param)


@pytest.fixture(scope="module")
def byte() -> CognexisTokenizer:
    return small_tokenizer("byte_reference")


@pytest.fixture
def unigram() -> CognexisTokenizer:
    return copy.deepcopy(small_tokenizer())


# ---- the ends of a text ----


def test_byte_reference_gives_the_reference_ids(byte):
    assert byte.encode("hi Σ", add_bos=False) == [114, 115, 42, 216, 173]
    assert len(byte) == 266


def test_text_gets_one_bos_and_no_eos(tokenizer):
    ids = tokenizer.encode("text")
    assert ids[0] == BOS and EOS not in ids and ids.count(BOS) == 1
    assert tokenizer.encode("text", add_bos=False) == tokenizer.encode("text", add_special_tokens=False) == ids[1:]
    assert tokenizer.encode("text", add_eos=True) == [*ids, EOS]
    assert tokenizer.encode("text", add_bos=False, add_eos=True) == [*ids[1:], EOS]
    assert tokenizer.encode("text", add_special_tokens=False, add_bos=True, add_eos=True) == [*ids, EOS]


def test_ends_that_stand_in_the_text_are_not_added_again(tokenizer):
    ids = tokenizer.encode("text")
    assert tokenizer.encode("<s>text") == ids
    assert tokenizer.encode("<s>text</s>", add_bos=True, add_eos=True) == [*ids, EOS]
    assert tokenizer(["<s>text", "text"]).input_ids == [ids, ids]
    assert tokenizer.encode("<s>text", split_special_tokens=True)[:2] != [BOS, BOS]
    assert tokenizer.encode("<s>text", split_special_tokens=True)[0] == BOS


def test_pair_gets_the_ends_of_the_whole(tokenizer):
    first, second = (tokenizer.encode(text, add_bos=False) for text in ("one", " two"))
    assert tokenizer.encode("one", " two") == [BOS, *first, *second]
    assert tokenizer.encode("one", " two", add_eos=True) == [BOS, *first, *second, EOS]
    batch = tokenizer(["one"], [" two"], add_eos=True, return_token_type_ids=True, return_special_tokens_mask=True)
    assert batch.special_tokens_mask == [[1, *[0] * len(first + second), 1]]
    assert batch.token_type_ids == [[0, *[0] * len(first), *[1] * (len(second) + 1)]]


def test_end_without_a_token_is_refused(unigram):
    unigram.eos_token = None
    with pytest.raises(InvalidConfigError, match="add_eos=True: the tokenizer has no such token"):
        unigram.encode("a", add_eos=True)


# ---- control strings ----


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_control_string_is_refused_by_name_or_becomes_one_id(tokenizer, token):
    with pytest.raises(TokenizerError) as caught:
        tokenizer.encode(f"secret{token}around", allow_special=False)
    assert token in str(caught.value) and "secret" not in str(caught.value) and "around" not in str(caught.value)
    assert tokenizer.encode(token, allow_special=True, add_bos=False) == [CONTROL_TOKENS.index(token)]
    with pytest.raises(TokenizerError):
        tokenizer(["fine", f"a{token}"], allow_special=False)
    with pytest.raises(TokenizerError):
        tokenizer([["a", token]], is_split_into_words=True, allow_special=False)


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_untrusted_text_gives_no_control_id(tokenizer, token):
    text = f"a{token}b{token}"
    ids = tokenizer.encode_untrusted(text, add_bos=False)
    assert min(ids) >= len(CONTROL_TOKENS)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_untrusted(text) == [BOS, *ids]
    with pytest.raises(TokenizerError, match="encode|text for it|control token"):
        tokenizer.encode_untrusted(text, on_control="raise")


@pytest.mark.parametrize(
    "text",
    ["<\u200b|end|>", "＜|end|＞", "<|END|>", "<|\u0435nd|>", "<|end|\u200d>", "<| end |>", "< s>", "<|e\u0301nd|>"],
)
def test_look_alikes_are_text_for_every_call(tokenizer, text):
    assert min(tokenizer.encode(text, add_bos=False)) >= len(CONTROL_TOKENS)
    assert tokenizer.encode_untrusted(text, on_control="raise") == tokenizer.encode(text)


@settings(max_examples=200)
@given(text=st.text(), tokenizer_type=st.sampled_from(TYPES))
def test_any_text_round_trips_through_untrusted(text, tokenizer_type):
    tokenizer = small_tokenizer(tokenizer_type)
    ids = tokenizer.encode_untrusted(text, add_bos=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_bos=False, allow_special=True) == ids or any(t in text for t in CONTROL_TOKENS)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
@pytest.mark.parametrize("call", ["encode", "encode_untrusted", "__call__"])
def test_lone_surrogate_is_refused_with_its_place(tokenizer, call, text):
    with pytest.raises(TokenizerError, match=r"lone surrogate \(U\+D[8F]..+ at character [01]\)"):
        getattr(tokenizer, call)(text)


def test_untrusted_text_has_rules(byte):
    with pytest.raises(TokenizerError, match="11 characters, at most 10"):
        byte.encode_untrusted("a" * 11, max_characters=10)
    with pytest.raises(TokenizerError, match="must be a string, got bytes"):
        byte.encode_untrusted(b"abc")
    with pytest.raises(InvalidConfigError, match="on_control='drop': must be one of text, raise"):
        byte.encode_untrusted("a", on_control="drop")
    assert byte.encode_untrusted("abcdef", truncation_policy="left", max_length=3, add_bos=False) == [110, 111, 112]


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "\u0301" * 500_000,
        "\x00" * 1_000_000,
        " " * 1_000_000,
        "<" * 1_000_000,
        "漢" * 300_000,
        "1" * 500_000,
    ],
    ids=["letters", "combining", "nul", "spaces", "signs", "chinese", "digits"],
)
def test_monotonous_text_takes_linear_time(tokenizer, text):
    def seconds(part: str) -> float:
        start = time.process_time()
        tokenizer.encode_untrusted(part)
        return time.process_time() - start

    tokenizer.encode_untrusted("warm")
    assert seconds(text[: len(text) // 4]) < 0.3 + len(text.encode()) / 4e6 * 4
    assert seconds(text) < 0.3 + len(text.encode()) / 1e6 * 4  # twice the goal: the machine may be busy


# ---- truncation ----


@pytest.mark.parametrize(
    ("max_length", "policy", "expected"),
    [(3, "left", "def"), (3, "right", "abc"), (4, "middle", "abef"), (5, "middle", "abdef"), (6, "error", "abcdef")],
)
def test_truncation_policies(byte, max_length, policy, expected):
    ids = byte.encode("abcdef", add_bos=False, truncation_policy=policy, max_length=max_length)
    assert byte.decode(ids) == expected


def test_truncation_comes_after_the_ends(byte):
    ids = byte.encode("abcdef", add_eos=True, truncation_policy="right", max_length=4)
    assert ids == [BOS, 107, 108, 109]
    assert byte.encode("abcdef", add_eos=True, truncation_policy="left", max_length=2) == [112, EOS]


@pytest.mark.parametrize("policy", ["left", "right", "middle"])
@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_masks_and_offsets_are_cut_with_the_ids(tokenizer, policy, excess):
    text = "def f(x): return Σ"
    whole = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, add_eos=True)
    size = len(whole.input_ids)
    limit = size - excess
    cut = tokenizer(
        text,
        add_eos=True,
        truncation_policy=policy,
        max_length=limit,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    kept = {"right": [*range(limit)], "left": [*range(size - limit, size)]}
    kept["middle"] = [*range(limit // 2), *range(size - (limit - limit // 2), size)]
    expected = range(size) if excess <= 0 else kept[policy]
    for name in ("input_ids", "offset_mapping", "special_tokens_mask", "attention_mask"):
        assert cut[name] == [whole[name][index] for index in expected]
    with pytest.raises(TokenizerError, match=f"the text has {size} tokens and max_length is {size - 1}"):
        tokenizer(text, add_eos=True, truncation_policy="error", max_length=size - 1)


def test_marker_stands_in_the_gap_and_counts(byte):
    marked = copy.deepcopy(byte)
    marked.init_kwargs["truncation_marker"] = ".."
    text = marked("abcdefgh", add_bos=False, truncation_policy="middle", max_length=5, return_offsets_mapping=True)
    assert byte.decode(text.input_ids) == "a..gh"
    assert text.offset_mapping == [(0, 1), (0, 0), (0, 0), (6, 7), (7, 8)]
    with pytest.raises(InvalidConfigError, match="marker alone has 2 tokens"):
        marked.encode("abcdefgh", truncation_policy="middle", max_length=1)


def test_batch_is_cut_then_padded(byte):
    batch = byte(["abcdef", "ab"], truncation_policy="middle", max_length=4, padding=True, return_tensors="pt")
    assert byte.batch_decode(batch.input_ids) == ["<s>aef", "<s>ab"]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    padded = byte(["a"], truncation_policy="right", max_length=4, padding="max_length")
    assert padded.input_ids == [[PAD, PAD, BOS, 107]]


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"truncation_policy": "right", "max_length": 3, "truncation": True}, "give one of them"),
        ({"truncation_policy": "head", "max_length": 3}, "must be one of error, left, right, middle"),
        ({"truncation_policy": "right"}, "needs a positive integer"),
        ({"truncation_policy": "right", "max_length": 0}, "needs a positive integer"),
        ({"truncation_policy": "right", "max_length": 3, "text_pair": "b"}, "for single texts"),
    ],
)
def test_truncation_that_makes_no_sense_is_refused(byte, settings_, match):
    with pytest.raises(InvalidConfigError, match=match):
        byte("abc", **settings_)


STOCK_SETTINGS = st.fixed_dictionaries(
    {"add_special_tokens": st.booleans(), "split_special_tokens": st.booleans()},
    optional={
        "padding": st.sampled_from([True, "max_length"]),
        "truncation": st.sampled_from([True, "longest_first", "only_first"]),
        "max_length": st.integers(2, 9),
        "padding_side": st.sampled_from(["left", "right"]),
        "return_overflowing_tokens": st.booleans(),
        "pad_to_multiple_of": st.sampled_from([None, 4]),
    },
)
PIECES = st.lists(st.sampled_from(["ab", " c", "<|end|>", "Σ", "\n", "12"]), max_size=6).map("".join)


@settings(max_examples=300)
@given(texts=st.lists(PIECES, min_size=1, max_size=3), pair=st.booleans(), chosen=STOCK_SETTINGS)
def test_stock_keywords_give_what_the_stock_class_gives(texts, pair, chosen):
    tokenizer = small_tokenizer("bpe")
    stock = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=list(CONTROL_TOKENS),
    )
    if chosen.get("pad_to_multiple_of") and "max_length" in chosen:
        chosen["max_length"] = 8
    if "max_length" not in chosen:
        chosen.pop("truncation", None)
    arguments = {
        "text_pair": texts[::-1] if pair else None,
        "return_offsets_mapping": True,
        "return_special_tokens_mask": True,
        "return_token_type_ids": not (pair and chosen.get("return_overflowing_tokens")),
        "verbose": False,
        **chosen,
    }
    try:
        expected = stock(texts, **arguments)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017, PT011 - the stock class raises what its backend raises
            tokenizer(texts, **arguments)
        return
    found = tokenizer(texts, **arguments)
    assert found.data == expected.data
    for index in range(len(found.input_ids)):
        if not pair:  # of a pair with an empty text, the backend's own account depends on the path inside it
            assert found.sequence_ids(index) == expected.sequence_ids(index)
        assert found.tokens(index) == expected.tokens(index)


def test_stride_that_leaves_nothing_is_refused(byte):
    with pytest.raises(InvalidConfigError, match="stride=2: must be smaller than the 2 tokens that remain"):
        byte("abcdef", truncation=True, max_length=3, stride=2, return_overflowing_tokens=True)


# ---- decoding ----


def test_decoding_keeps_white_space_and_leaves_padding_out(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode_untrusted(text, add_eos=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(ids) == f"<s>{text}</s>"
        assert tokenizer.decode([PAD, *ids, PAD]) == f"<s>{text}</s>"
        assert tokenizer.decode([PAD, *ids], skip_padding=False) == f"<pad><s>{text}</s>"
        assert tokenizer.decode(ids, show_special=False) == text
        assert tokenizer.decode([*ids, *ids], stop_at_eos=True) == f"<s>{text}"
    assert tokenizer.decode([]) == "" and tokenizer.decode(BOS) == "<s>"
    with pytest.raises(InvalidConfigError, match="contradicts"):
        tokenizer.decode([1], show_special=True, skip_special_tokens=True)


@pytest.mark.parametrize("wrong", [9999, -1, 1.0, 2.5, True, "a", None, 2**70, float("nan")])
def test_id_outside_the_vocabulary_is_refused(tokenizer, wrong):
    for call in (lambda: tokenizer.decode([11, wrong]), lambda: tokenizer.batch_decode([[11], [wrong]])):
        with pytest.raises(InvalidTokenIdError, match="outside the vocabulary|must be integers"):
            call()


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_arrays_are_decoded_and_checked(byte, make):
    assert byte.decode(make([114, 115])) == "hi"
    assert byte.batch_decode(make([[114], [115]])) == ["h", "i"]
    for wrong in (make([114, 266]), make([[-1]]), make([114.0])):
        with pytest.raises(InvalidTokenIdError):
            byte.batch_decode(wrong)


def test_invalid_bytes_become_one_sign_each(byte):
    assert byte.decode([10 + 0xCE, 10 + 0xA3, 10 + 0xFF, 107]) == "Σ\ufffda"


# ---- threads and copies ----


def test_threads_with_different_settings_do_not_disturb_each_other(tokenizer):
    texts = [text * 20 for text in TEXTS if text] + [f"{token} x" for token in CONTROL_TOKENS]
    calls = [
        lambda: tokenizer(texts, padding=True).input_ids,
        lambda: tokenizer(texts, truncation=True, max_length=5).input_ids,
        lambda: tokenizer(texts, padding="max_length", max_length=9, truncation=True).input_ids,
        lambda: [tokenizer.encode_untrusted(text) for text in texts],
        lambda: tokenizer(texts, truncation_policy="middle", max_length=7).input_ids,
        lambda: tokenizer(texts, split_special_tokens=True).input_ids,
        lambda: tokenizer.apply_chat_template([{"role": "user", "content": text} for text in texts]).input_ids,
        lambda: tokenizer(texts).input_ids,
    ]
    expected = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        work = [index for index in range(len(calls)) for _ in range(15)]
        random.shuffle(work)
        found = list(pool.map(lambda index: calls[index](), work))
    assert [expected[index] for index in work] == found


def test_eight_threads_encode_the_same_corpus_equal():
    tokenizer = copy.deepcopy(small_tokenizer())  # nothing is built yet
    corpus = [text * 50 for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tokenizer(corpus).input_ids, range(8)))
    assert all(ids == found[0] for ids in found)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_keep_the_guard_and_the_record(tokenizer, clone):
    tokenizer.encode_untrusted("built")
    other = clone(tokenizer)
    assert min(other.encode_untrusted("<|end|></s>", add_bos=False)) >= len(CONTROL_TOKENS)
    assert other.encode("<|end|>", add_bos=False) == [9]
    assert other.manifest == tokenizer.manifest


def test_added_tokens_are_guarded_and_change_the_checksum(unigram):
    before = unigram.checksum
    unigram.encode_untrusted("built")
    assert unigram.add_special_tokens({"extra_special_tokens": ["<|think|>"]}, replace_extra_special_tokens=False) == 1
    assert unigram.encode("<|think|>", add_bos=False) == [700]
    assert 700 not in unigram.encode_untrusted("<|think|>")
    assert unigram.decode([700]) == "<|think|>"
    with pytest.raises(TokenizerError, match=r"<\|think\|>"):
        unigram.encode("<|think|>", allow_special=False)
    assert unigram.checksum != before
    assert {"name": "think", "token": "<|think|>", "id": 700} in unigram.manifest["special_tokens"]


def test_piece_of_the_vocabulary_cannot_be_a_control_token(unigram):
    unigram.add_tokens([AddedToken(" the", special=True)], special_tokens=True)
    with pytest.raises(TokenizerError, match="also an ordinary piece"):
        unigram.encode_untrusted("the")


def test_model_keeps_its_logits_when_the_vocabulary_grows(unigram):
    model = tiny_model(tiny_config(vocab_size=len(unigram)))
    ids = torch.tensor([unigram.encode("def f(x): return x")])
    before = model(ids).logits
    unigram.add_tokens(["<|new|>", "another"])
    model.resize_token_embeddings(len(unigram))
    after = model(ids).logits
    assert after.shape[-1] == len(unigram) == 702
    torch.testing.assert_close(after[..., :700], before, rtol=0, atol=0)
    assert isinstance(model, CognexisForCausalLM) and model(torch.tensor([[700, 701]])).logits.isfinite().all()


# ---- files ----


@pytest.mark.parametrize("load", [CognexisTokenizer, AutoTokenizer, PreTrainedTokenizerFast])
def test_saved_files_load_with_the_same_ids(tokenizer, load, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path)
    assert isinstance(loaded, CognexisTokenizer) == (load is not PreTrainedTokenizerFast)
    for text in (*TEXTS, "<|user|>x"):
        assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.padding_side == "left" and loaded.chat_template == tokenizer.chat_template


def test_saved_files_say_nothing_of_the_machine(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = CognexisTokenizer.from_pretrained(tmp_path / "a", local_files_only=True)
    loaded(["a"], padding=True, truncation=True, max_length=4)
    loaded.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "vocab", "name_or_path"} & set(config)
    for name in ("tokenizer.json", "tokenizer_manifest.json", "tokenizer_config.json", "tokens_cognexis.py"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert loaded.checksum == tokenizer.checksum


WITHOUT_PACKAGE = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer, PreTrainedTokenizerFast
chat = [{"role": "user", "content": "x <|end|> y"}, {"role": "assistant", "content": "z"}]
seen = {}
for name, place in (("directory", sys.argv[1]), ("hub_cache", "me/tokenizer")):
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
    tokenizer.save_pretrained(f"{sys.argv[1]}_{name}")
    seen[name] = {
        "module": type(tokenizer).__module__.partition(".")[0],
        "untrusted": tokenizer.encode_untrusted("a <|end|> b"),
        "chat": tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True).data,
        "checksum": tokenizer.checksum,
        "files": sorted(path.name for path in Path(f"{sys.argv[1]}_{name}").iterdir()),
        "again": AutoTokenizer.from_pretrained(f"{sys.argv[1]}_{name}", trust_remote_code=True).manifest,
        "stock": PreTrainedTokenizerFast.from_pretrained(place).encode("plain"),
    }
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_folder_loads_without_the_package(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    repository = tmp_path / "repository"  # offline, AutoTokenizer cannot know that a repository has no config.json
    tokenizer.save_pretrained(repository)
    (repository / "config.json").write_text(json.dumps({"tokenizer_checksum": tokenizer.checksum}))
    put_in_hub_cache(repository, tmp_path / "home", "me/tokenizer")
    seen = run_without_package(WITHOUT_PACKAGE, tmp_path / "tokenizer", hf_home=tmp_path / "home")
    chat = [{"role": "user", "content": "x <|end|> y"}, {"role": "assistant", "content": "z"}]
    expected = {
        "module": "transformers_modules",
        "untrusted": tokenizer.encode_untrusted("a <|end|> b"),
        "chat": tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True).data,
        "checksum": tokenizer.checksum,
        "files": sorted(path.name for path in (tmp_path / "tokenizer").iterdir()),
        "again": tokenizer.manifest,
        "stock": tokenizer.encode("plain"),
    }
    assert seen == {"directory": expected, "hub_cache": expected}


def test_model_and_tokenizer_share_a_folder(tmp_path):
    tokenizer, model = small_tokenizer(), tiny_model(tiny_config(vocab_size=700))
    model.save_pretrained(tmp_path)
    before = {path.name for path in tmp_path.glob("*.py")}
    assert "modeling_cognexis.py" in before and "tokenization_cognexis.py" not in before
    tokenizer.save_pretrained(tmp_path)
    with_tokenizer = {path.name for path in tmp_path.glob("*.py")}
    assert {"tokenization_cognexis.py", "tokens_cognexis.py"} <= with_tokenizer and before < with_tokenizer
    tiny_config(vocab_size=700).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == with_tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path).checksum == tokenizer.checksum


def test_config_beside_the_tokenizer_is_compared(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_config(vocab_size=700, tokenizer_checksum=tokenizer.checksum).save_pretrained(tmp_path)
    CognexisTokenizer.from_pretrained(tmp_path)
    small_tokenizer("bpe").save_pretrained(tmp_path)
    with pytest.raises(ArtifactMismatchError, match="config.json says tokenizer_checksum sha256:"):
        CognexisTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ArtifactMismatchError):
        AutoTokenizer.from_pretrained(tmp_path)


def test_mismatch_can_be_allowed_with_a_warning(tmp_path, monkeypatch):
    from cognexis import tokenization_cognexis

    warnings = []
    monkeypatch.setattr(tokenization_cognexis.logger, "warning", warnings.append)
    small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"tokenizer_checksum": "sha256:" + "0" * 64}))
    loaded = CognexisTokenizer.from_pretrained(tmp_path, allow_tokenizer_mismatch=True)
    assert loaded.encode("a") == small_tokenizer().encode("a")
    assert len(warnings) == 1 and "config.json says tokenizer_checksum" in warnings[0]


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises((TokenizerError, OSError)):
        CognexisTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        CognexisTokenizer.from_pretrained(tmp_path)
