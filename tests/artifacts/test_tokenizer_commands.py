"""Commands: what they make and say, and that nothing is written when an input is bad."""

import json

import pytest

from cognexis import CognexisTokenizer
from cognexis.artifacts.tokenizer_commands import TrainingOrder, inspect, tokenize, train
from cognexis.errors import ArtifactMismatchError, InvalidConfigError, TokenizerError

TEXT = "Some text with many different words, to learn pieces of: apples, oranges, mountains, rivers and clouds.\n" * 30


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT)
    (folder / "deep" / "b.md").write_text("# Another\n" + TEXT.upper())
    (folder / "c.bin").write_bytes(b"\xff\xfe")
    return folder


def order(texts, tmp_path, **changes):
    return TrainingOrder(**{"inputs": [texts], "output_dir": tmp_path / "out", "vocab_size": 380, **changes})


@pytest.mark.parametrize("tokenizer_type", ["sentencepiece", "bpe"])
def test_folder_becomes_a_tokenizer_that_loads(texts, tmp_path, tokenizer_type):
    lines: list[str] = []
    made = train(order(texts, tmp_path, tokenizer_type=tokenizer_type, licence="CC0-1.0"), lines.append)
    assert made["vocab_size"] == 380 and made["type"] == tokenizer_type
    assert made["source"] == ["texts  (CC0-1.0)"] and made["verified"] == "agrees with its manifest"
    assert len(lines) == 3 and "2 files" in lines[0]
    assert CognexisTokenizer.from_pretrained(tmp_path / "out").checksum == made["checksum"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]
    again = train(order(texts, tmp_path, tokenizer_type=tokenizer_type, output_dir=tmp_path / "again"))
    assert again["checksum"] == made["checksum"]


def test_byte_reference_needs_no_text(tmp_path):
    made = train(TrainingOrder([], tmp_path / "out", tokenizer_type="byte_reference", with_code=False))
    assert made["vocab_size"] == 266
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"inputs": []}, InvalidConfigError, "no input"),
        ({"inputs": ["nowhere"]}, InvalidConfigError, "no such folder or file"),
        ({"tokenizer_type": "wordpiece"}, InvalidConfigError, "must be one of sentencepiece, bpe, byte_reference"),
        ({"vocab_size": 10}, InvalidConfigError, "vocab_size must be at least"),
        ({"vocab_size": 5000}, TokenizerError, "give more text"),
        ({"max_characters": 0}, InvalidConfigError, "max_characters must be positive"),
        ({"max_characters": 5}, TokenizerError, "there is no text"),
    ],
)
def test_bad_order_writes_nothing(texts, tmp_path, changes, error, match):
    with pytest.raises(error, match=match):
        train(order(texts, tmp_path, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_file_that_is_no_text_is_refused(texts, tmp_path):
    with pytest.raises(TokenizerError, match=r"c\.bin: byte 0 is not UTF-8"):
        train(order(texts / "c.bin", tmp_path))


def test_used_output_folder_is_refused(texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(InvalidConfigError, match="exists and is not empty"):
        train(order(texts, tmp_path))
    assert (tmp_path / "out" / "note").read_text() == "mine"


def test_output_that_cannot_be_written_is_an_error(texts, tmp_path):
    with pytest.raises(InvalidConfigError, match="cannot be written"):
        train(order(texts, tmp_path, output_dir=texts / "a.txt" / "out"))


def test_inspect_and_tokenize_take_a_folder_or_a_file(tmp_path):
    train(TrainingOrder([], tmp_path / "t", tokenizer_type="byte_reference"))
    for place in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        found = inspect(place, "hi Σ")
        assert found["compression"] == {"characters": 4, "bytes": 5, "tokens": 5, "bytes_per_token": 1.0}
        assert json.loads(json.dumps(found)) == found
        shown = tokenize(place, "hi Σ")
        assert shown["ids"] == [114, 115, 42, 216, 173] and shown["text"] == "hi Σ"
        assert shown["pieces"][0] == "<0x68>"
    assert min(tokenize(tmp_path / "t", "<|end|>")["ids"]) > 9
    assert tokenize(tmp_path / "t", "<|end|>", allow_special=True, add_bos=True)["ids"] == [0, 9]


def test_damaged_or_missing_tokenizer_is_an_error(tmp_path):
    with pytest.raises(InvalidConfigError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(TokenizerError):
        tokenize(tmp_path, "a")
    train(TrainingOrder([], tmp_path / "t", tokenizer_type="byte_reference"))
    path = tmp_path / "t" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<0x41>"', '"<0x4Z>"'))
    with pytest.raises(ArtifactMismatchError, match="says checksum"):
        inspect(tmp_path / "t")
