"""Text of data manifests and of the standard library, as rows for an evaluation."""

import json
from pathlib import Path

import pytest

from cognexis.artifacts.shipped_tokenizer import load_default_tokenizer
from cognexis.artifacts.text_corpus import standard_library_corpus
from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.eval_harness.scaling import text_rows
from cognexis.eval_harness.scaling.text_rows import HELD_OUT_CHARACTERS, HELD_OUT_SHARE, read_text_rows
from cognexis.training.data.build import BuildOrder, build_data
from cognexis.training.data.inputs import DataInput
from cognexis.training.data.manifest import DataManifest, ShardEntry
from cognexis.training.quickstart_training import QuickstartSettings


@pytest.fixture(scope="module")
def tokenizer():
    return load_default_tokenizer()


@pytest.fixture
def data(tmp_path, tokenizer):
    """A folder that `cognexis data build` made, and the text it was made of."""
    texts = [f"Document {n} says that {n} loops are better than {n - 1}." for n in range(1, 30)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_data(BuildOrder([DataInput(tmp_path / "text.jsonl")], tmp_path / "data", tokenizer))
    return tmp_path


def rows(path, tokenizer):
    return read_text_rows(path, tokenizer, 20, len(tokenizer)).tolist()


def test_manifest_gives_the_rows_of_its_text(data, tokenizer):
    expected = rows(data / "text.jsonl", tokenizer)
    assert rows(data / "data", tokenizer) == expected
    assert rows(data / "data" / "data_manifest.json", tokenizer) == expected


def test_manifest_over_text_files_is_read_too(data, tokenizer):
    from cognexis.checkpoints.hashing import file_checksum

    shard = ShardEntry("text.jsonl", "jsonl_text", 29, None, file_checksum(data / "text.jsonl"))
    DataManifest((shard,), data).write(data / "data_manifest.json")
    assert rows(data, tokenizer) == rows(data / "text.jsonl", tokenizer)


def change(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def test_changed_shard_and_manifest_are_refused(data, tokenizer):
    (shard,) = (data / "data").glob("*.bin")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(ArtifactMismatchError, match="has checksum"):
        rows(data / "data", tokenizer)
    shard.write_bytes(whole)
    change(data / "data" / "data_manifest.json", counts={})
    with pytest.raises(ArtifactMismatchError, match="the content has checksum"):
        rows(data / "data", tokenizer)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer": {"checksum": "sha256:" + "1" * 64}}, ArtifactMismatchError, "made with tokenizer sha256:1111"),
        ({"format": "parquet"}, InvalidConfigError, "format='parquet': must be one of token_ids_u32"),
        ({"path": "../text.jsonl"}, InvalidConfigError, "must be a file in the manifest's folder"),
        ({"path": "none.bin"}, InvalidConfigError, "must be a file in the manifest's folder"),
    ],
)
def test_shards_that_cannot_be_read(data, tokenizer, changes, error, message):
    from cognexis.training.data.manifest import canonical_checksum

    path = data / "data" / "data_manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    if "tokenizer" in changes:
        content["tokenizer"] |= changes["tokenizer"]
    else:
        content["shards"][0] |= changes
    path.write_text(json.dumps(content | {"sha256": canonical_checksum(content)}))
    with pytest.raises(error, match=message):
        rows(data / "data", tokenizer)


def test_manifest_of_a_checkpoint_is_no_text(tmp_path, tokenizer):
    (tmp_path / "data_manifest.json").write_text('{"training": {}, "held_out": {}}')
    with pytest.raises(InvalidConfigError, match="is this the manifest of `cognexis data build`"):
        rows(tmp_path, tokenizer)


def test_held_out_text_is_what_the_quickstart_does_not_train_on(tokenizer, monkeypatch):
    settings = QuickstartSettings()
    assert (settings.corpus_characters, settings.held_out_share) == (HELD_OUT_CHARACTERS, HELD_OUT_SHARE)
    monkeypatch.setattr(text_rows, "HELD_OUT_CHARACTERS", 600_000)
    found = rows(Path("quickstart-held-out"), tokenizer)
    training, held_out = standard_library_corpus(600_000).split(HELD_OUT_SHARE)
    first = tokenizer(held_out.documents[0], add_special_tokens=False, split_special_tokens=True).input_ids
    assert found[0] == [tokenizer.bos_token_id, *first[:20]]
    assert not set(training.names) & set(held_out.names)
