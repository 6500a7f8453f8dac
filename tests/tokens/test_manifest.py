"""The manifest: its fields, its rules, and that no changed byte of the tokenizer goes unnoticed."""

import json
import random

import pytest

from cognexis import CognexisTokenizer
from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.errors import ArtifactMismatchError, TokenizerError
from cognexis.tokens.manifest import MANIFEST_FILE, backend_checksum, check_manifest, read_manifest
from tests.batteries.small_tokenizers import TYPES, small_tokenizer


@pytest.fixture
def folder(tmp_path):
    small_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change(folder, **fields):
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest.update({key: value for key, value in fields.items() if value is not None})
    path.write_text(json.dumps({key: value for key, value in manifest.items() if fields.get(key, "") is not None}))


@pytest.mark.parametrize("tokenizer_type", TYPES)
def test_manifest_says_what_the_tokenizer_is(tokenizer_type, tmp_path):
    tokenizer = small_tokenizer(tokenizer_type)
    tokenizer.save_pretrained(tmp_path)
    manifest = read_manifest(tmp_path / MANIFEST_FILE)
    assert manifest == tokenizer.manifest
    assert manifest["schema_version"] == 1 and manifest["type"] == tokenizer_type
    assert manifest["vocab_size"] == len(tokenizer)
    assert manifest["allow_byte_fallback"] and manifest["add_bos_default"] and not manifest["add_eos_default"]
    assert manifest["chat_template"] == "chatml_v1"
    names = ["bos", "eos", "pad", "unk", "eod", "system", "user", "assistant", "tool", "end"]
    assert [entry["name"] for entry in manifest["special_tokens"]] == names
    assert [entry["id"] for entry in manifest["special_tokens"]] == list(range(10))
    assert {"unicode_form", "lowercase", "whitespace", "byte_fallback", "invalid_utf8"} <= set(
        manifest["normalization"]
    )


def test_record_of_the_training_is_kept(tmp_path):
    text = "some words to make pieces of, some words to join. " * 20
    source = [{"package": "words", "sha256": "0" * 64}]
    tokenizer = train_tokenizer([text], 380, tokenizer_version="7", source=source, tokenizer_type="bpe")
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = CognexisTokenizer.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    manifest = read_manifest(tmp_path / "b" / MANIFEST_FILE)
    assert (manifest["tokenizer_version"], manifest["source"], manifest["type"]) == ("7", source, "bpe")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"schema_version": 2}, "schema_version=2 must be 1"),
        ({"schema_version": True}, "schema_version=True has the wrong type"),
        ({"tokenizer_version": " "}, "tokenizer_version=' ' must not be empty"),
        ({"vocab_size": 0}, "vocab_size=0 must be positive"),
        ({"type": "wordpiece"}, "type='wordpiece' must be one of"),
        ({"checksum": "sha256:abc"}, "checksum='sha256:abc' must be sha256: and 64 hex digits"),
        ({"checksum": None}, "checksum is missing"),
        ({"add_bos_default": "yes"}, "add_bos_default='yes' has the wrong type"),
        ({"special_tokens": []}, "bos is missing; eos is missing; pad is missing; unk is missing; eod is missing"),
        ({"special_tokens": ["<s>"]}, "must have the fields name, token and id"),
    ],
)
def test_malformed_manifest_is_refused(folder, fields, match):
    change(folder, **fields)
    with pytest.raises(TokenizerError, match=match):
        CognexisTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("index", "field", "value", "match"),
    [
        (0, "id", 700, r"id 700 of bos must lie in \[0, 700\)"),
        (0, "id", -1, "id -1 of bos"),
        (0, "id", True, "id True of bos"),
        (1, "id", 0, "id 0 occurs twice"),
        (1, "token", "<s>", "token '<s>' occurs twice"),
        (1, "name", "bos", "name 'bos' occurs twice; eos is missing"),
        (1, "token", "", "token must be a string that is not empty"),
    ],
)
def test_special_tokens_of_a_manifest_have_rules(index, field, value, match):
    manifest = json.loads(json.dumps(small_tokenizer().manifest))
    manifest["special_tokens"][index][field] = value
    with pytest.raises(TokenizerError, match=match):
        check_manifest(manifest)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\ufeff{}", "[" * 100_000])
def test_manifest_that_is_no_object_is_refused(folder, content):
    (folder / MANIFEST_FILE).write_text(content, "utf-8")
    with pytest.raises(TokenizerError, match=MANIFEST_FILE):
        CognexisTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 701},
        {"add_eos_default": True},
        {"chat_template": "sha256:" + "0" * 64},
        {"checksum": "sha256:" + "0" * 64},
    ],
)
def test_manifest_of_another_tokenizer_is_refused(folder, fields):
    change(folder, **fields)
    with pytest.raises(ArtifactMismatchError, match=next(iter(fields))):
        CognexisTokenizer.from_pretrained(folder)
    loaded = CognexisTokenizer.from_pretrained(folder, allow_tokenizer_mismatch=True)
    assert loaded.checksum == small_tokenizer().checksum


def test_changed_chat_template_is_noticed_unless_the_caller_gave_it(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|end|>", ""))
    with pytest.raises(ArtifactMismatchError, match="chat_template 'chatml_v1'"):
        CognexisTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    own = CognexisTokenizer.from_pretrained(folder, chat_template="{{ messages[0].content }}")
    assert own.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    own.save_pretrained(folder)
    assert read_manifest(folder / MANIFEST_FILE)["chat_template"].startswith("sha256:")
    CognexisTokenizer.from_pretrained(folder)


def test_every_flipped_byte_of_the_model_file_is_noticed(folder):
    path = folder / "tokenizer.json"
    content = path.read_bytes()
    expected = read_manifest(folder / MANIFEST_FILE)["checksum"]
    source = random.Random(0)
    unnoticed = []
    for _ in range(1500):
        place, bit = source.randrange(len(content)), source.randrange(8)
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        try:
            if backend_checksum(bytes(damaged)) == expected:
                unnoticed.append((place, bit))
        except TokenizerError:
            pass
    assert unnoticed == []
    for place in (0, len(content) // 3, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises((TokenizerError, ArtifactMismatchError)):
            CognexisTokenizer.from_pretrained(folder)
    path.write_bytes(content[:-100])
    with pytest.raises(TokenizerError, match="tokenizer.json cannot be read"):
        CognexisTokenizer.from_pretrained(folder)


def test_file_that_the_backend_cannot_use_is_refused(folder):
    (folder / MANIFEST_FILE).unlink()
    model = json.loads((folder / "tokenizer.json").read_text())
    model["model"]["unk_id"] = 10**6
    (folder / "tokenizer.json").write_text(json.dumps(model))
    with pytest.raises(TokenizerError, match="tokenizer.json cannot be used"):
        CognexisTokenizer.from_pretrained(folder)


def test_single_file_is_compared_with_the_manifest_beside_it(folder):
    assert len(CognexisTokenizer.from_pretrained(folder / "tokenizer.json")) == 700
    change(folder, checksum="sha256:" + "0" * 64)
    with pytest.raises(ArtifactMismatchError):
        CognexisTokenizer.from_pretrained(folder / "tokenizer.json")


def test_lone_file_gives_the_same_ids(folder, tmp_path_factory):
    lone = tmp_path_factory.mktemp("lone") / "tokenizer.json"
    lone.write_bytes((folder / "tokenizer.json").read_bytes())
    tokenizer = CognexisTokenizer.from_pretrained(lone)
    assert tokenizer.encode("a<|end|>", add_eos=True) == small_tokenizer().encode("a<|end|>", add_eos=True)
    assert tokenizer.checksum == small_tokenizer().checksum and tokenizer.pad_token_id == 2


def test_checksum_ignores_padding_and_truncation_only():
    tokenizer = small_tokenizer("bpe")
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    assert backend_checksum(json.dumps({**model, "padding": {"length": 3}, "truncation": {}}, indent=3)) == (
        tokenizer.checksum
    )
    for key in model.keys() - {"padding", "truncation"}:
        assert backend_checksum(json.dumps({**model, key: "other"})) != tokenizer.checksum
    assert backend_checksum(json.dumps({**model, "further": 1})) != tokenizer.checksum


def test_tokenizer_without_the_needed_control_tokens_is_not_saved(tmp_path):
    tokenizer = CognexisTokenizer(tokenizer_object=small_tokenizer("bpe").backend_tokenizer, bos_token="<s>")
    with pytest.raises(TokenizerError, match="eos is missing|occurs twice"):
        CognexisTokenizer(tokenizer_object=_bare_backend()).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert tokenizer.encode("a")[0] == 0


def _bare_backend():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE({"a": 0, "b": 1}, []))
