"""Token shards, their manifest, and the rows that are read from them."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from cognexis.errors import ArtifactMismatchError, InvalidConfigError, InvalidTokenIdError
from cognexis.training.data.blocks import JoinedRows, TokenRows
from cognexis.training.data.manifest import DATA_MANIFEST, canonical_checksum, is_inner_path, read_data_manifest
from cognexis.training.data.opening import open_data
from cognexis.training.data.packing import Packing, pack_documents
from cognexis.training.data.shard_writer import TokenShardWriter
from cognexis.training.data.token_shard import TokenShard
from cognexis.training.data.verify import verify_data

PAD, EOD = 2, 4


def write_shard(path, documents, masks=None) -> TokenShard:
    writer = TokenShardWriter(path)
    for index, document in enumerate(documents):
        writer.add(np.array(document), masks[index] if masks else None)
    writer.close()
    return TokenShard(path)


def random_documents(seed: int, count: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [[*generator.integers(10, 99, size).tolist(), EOD] for size in generator.integers(1, 30, count)]


# ---- shards ----


def test_shard_gives_back_its_documents(tmp_path):
    documents = random_documents(0, 50)
    shard = write_shard(tmp_path / "a.bin", documents)
    assert (shard.num_documents, shard.num_tokens) == (50, sum(map(len, documents)))
    assert [shard.document(index).tolist() for index in range(50)] == documents
    assert (tmp_path / "a.bin").read_bytes() == np.concatenate(documents).astype("<u4").tobytes()
    stream = np.repeat(np.arange(50), [len(document) for document in documents])
    for start, stop in [(0, 1), (3, 90), (17, 18), (shard.num_tokens - 5, shard.num_tokens)]:
        assert shard.documents_of(start, stop).tolist() == stream[start:stop].tolist()
    with pytest.raises(InvalidConfigError, match="document 50: there are 50"):
        shard.document(50)


def test_bare_token_file_ends_documents_at_the_end_token(tmp_path):
    documents = random_documents(1, 20)
    for name, rest in (("a.bin", []), ("b.bin", [[33, 34]])):
        np.concatenate(documents + rest).astype("<u4").tofile(tmp_path / name)
        shard = TokenShard(tmp_path / name, eod_token_id=EOD)
        assert [shard.document(index).tolist() for index in range(shard.num_documents)] == documents + rest
    with pytest.raises(InvalidConfigError, match="has no a.ends beside it; give eod_token_id"):
        TokenShard(tmp_path / "a.bin")


def test_shard_is_small_when_it_travels_to_a_worker(tmp_path):
    shard = write_shard(tmp_path / "a.bin", random_documents(2, 2000))
    assert shard.document(3).size and len(pickle.dumps(shard)) < 1000
    assert pickle.loads(pickle.dumps(shard)).document(1999).tolist() == shard.document(1999).tolist()


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".bin", b"", r"a\.bin: is empty"),
        (".bin", b"123456", r"a\.bin: 6 bytes are no multiple of 4"),
        (".ends", b"1234567", r"a\.ends: 7 bytes are no multiple of 8"),
        (".ends", np.array([3], "<u8").tobytes(), "the last document ends at 3, the shard at 9"),
        (".mask", b"\1", r"a\.mask: must have one byte for each of 9 tokens"),
        (".bin", None, r"a\.bin: no such file"),
    ],
)
def test_damaged_shards_are_refused_with_the_file_and_the_numbers(tmp_path, suffix, content, message):
    write_shard(tmp_path / "a.bin", [[10, 11, EOD], [12, 13, 14, 15, 16, EOD]])
    path = (tmp_path / "a").with_suffix(suffix)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InvalidConfigError, match=message):
        TokenShard(tmp_path / "a.bin")


# ---- rows ----


@pytest.mark.parametrize("length", [1, 2, 7, 64, 5000])
def test_rows_of_a_shard_are_those_of_packing_in_memory(tmp_path, length):
    documents = random_documents(3, 40)
    packing = Packing(length, PAD)
    rows = TokenRows(write_shard(tmp_path / "a.bin", documents), packing)
    expected = pack_documents([document[:-1] for document in documents], packing, EOD)
    assert len(rows) == len(expected)
    for index in [0, len(rows) // 2, len(rows) - 1]:
        assert all(torch.equal(rows[index][name], expected[index][name]) for name in expected[index])
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_every_token_but_a_lone_last_one_is_in_one_row(tmp_path):
    documents = random_documents(4, 200)
    shard = write_shard(tmp_path / "a.bin", documents)
    rows = TokenRows(shard, Packing(6, PAD))
    seen = torch.cat([row["input_ids"][row["attention_mask"] == 1] for row in rows])
    assert seen.tolist() == shard.tokens[: len(seen)].tolist() and shard.num_tokens - len(seen) <= 1


def test_unpacked_rows_hold_one_document_each_and_long_ones_go_on(tmp_path):
    documents = [[10, 11, EOD], [*range(20, 30), EOD], [12, EOD]]
    rows = TokenRows(write_shard(tmp_path / "a.bin", documents), Packing(4, PAD), packed=False)
    assert [row["input_ids"].tolist() for row in rows] == [
        [10, 11, EOD],
        [20, 21, 22, 23, 24],
        [25, 26, 27, 28, 29],
        [12, EOD],
    ]
    assert rows[2]["labels"].tolist() == [-100, 26, 27, 28, 29]


def test_rows_without_a_target_are_left_out(tmp_path):
    documents = [[10] * 9 + [EOD], [11, 12, 13, EOD]]
    masks = [[0] * 10, [0, 0, 1, 0]]
    shard = write_shard(tmp_path / "a.bin", documents, masks)
    rows = TokenRows(shard, Packing(4, PAD))
    assert len(rows) == 1 and rows[0]["labels"].tolist() == [-100, -100, 13, -100, -100]
    assert len(TokenRows(shard, Packing(4, PAD), packed=False)) == 1
    nothing = write_shard(tmp_path / "b.bin", [[10, 11, EOD]], [[1, 0, 0]])
    with pytest.raises(InvalidConfigError, match=r"b\.bin: none of its 1 documents has a token to learn"):
        TokenRows(nothing, Packing(4, PAD))


def test_token_outside_the_vocabulary_is_named_when_it_is_read(tmp_path):
    shard = write_shard(tmp_path / "a.bin", [[10, 11, 77, EOD]])
    with pytest.raises(InvalidTokenIdError, match=r"a\.bin: token 2 is id 77; ids lie in 0 to 49") as caught:
        TokenRows(shard, Packing(4, PAD), vocab_size=50)[0]
    assert caught.value.token_id == 77


def test_joined_rows_know_their_domains(tmp_path):
    parts = [TokenRows(write_shard(tmp_path / f"{n}.bin", random_documents(n, 10)), Packing(5, PAD)) for n in (0, 1)]
    rows = JoinedRows(parts, ["a", "b"], with_domain=True)
    split = len(parts[0])
    assert (rows[split - 1]["domain"], rows[split]["domain"], rows.domain_of(len(rows) - 1)) == ("a", "b", "b")
    assert torch.equal(rows[split]["input_ids"], parts[1][0]["input_ids"])
    with pytest.raises(IndexError):
        rows[len(rows)]


# ---- manifests ----


@pytest.fixture
def built(build, write_jsonl, tmp_path):
    path = write_jsonl([{"text": f"text {index}"} for index in range(20)])
    build(path, shard_tokens=100)
    return tmp_path / "out"


def rewrite(folder, change) -> None:
    """Change a manifest and give it the right checksum again."""
    content = json.loads((folder / DATA_MANIFEST).read_text())
    change(content)
    content.pop("sha256", None)
    (folder / DATA_MANIFEST).write_text(json.dumps(content | {"sha256": canonical_checksum(content)}))


def shard_change(**values):
    return lambda content: content["shards"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(shards=[]), "shards: must be a list with at least one entry"),
        (lambda content: content.update(schema_version=2), "schema_version=2: must be 1"),
        (lambda content: content.update(shard=[]), "unknown key 'shard'.*did you mean 'shards'"),
        (lambda content: content.update(sources={}), "sources: must be a list"),
        (lambda content: content["shards"].append(content["shards"][0]), "stands 2 times"),
        (lambda content: content["shards"][0].pop("num_tokens"), r"shards\[0\].num_tokens=None: is missing"),
        (shard_change(path=""), r"shards\[0\].path='': must be a relative path"),
        (shard_change(path="../a.bin"), "without '..'"),
        (shard_change(path="/etc/passwd"), "must be a relative path"),
        (shard_change(format="u32"), "format='u32': must be one of jsonl_text"),
        (shard_change(num_tokens=-1), "num_tokens=-1"),
        (shard_change(num_documents=True), "num_documents=True"),
        (shard_change(weight=0), "weight=0: must be a finite number above 0"),
        (shard_change(weight=-1), "weight=-1"),
        (shard_change(weight="1"), "weight='1'"),
        (shard_change(sha256="fnv:1"), "sha256='fnv:1': must be sha256: and 64 hexadecimal digits"),
        (shard_change(domain=3), "domain=3: must be a string"),
        (shard_change(companions={"../x": "sha256:" + "0" * 64}), "companions"),
        (shard_change(wieght=1), "unknown key 'wieght'.*did you mean 'weight'"),
    ],
)
def test_bad_manifests_are_refused_with_the_entry_and_the_rule(built, change, message):
    rewrite(built, change)
    with pytest.raises(InvalidConfigError, match=message):
        read_data_manifest(built)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "must be one object"),
        (b"{", "not valid JSON"),
        (b'{"schema_version": 1, "shards": [{}], "sha256": 5}', "sha256=5"),
        (b'{"shards": [{"weight": NaN}]}', "not finite"),
    ],
)
def test_files_that_are_no_manifest_are_refused(tmp_path, content, message):
    (tmp_path / DATA_MANIFEST).write_bytes(content)
    with pytest.raises(InvalidConfigError, match=message):
        read_data_manifest(tmp_path)
    with pytest.raises(InvalidConfigError, match="cannot be read: No such file"):
        read_data_manifest(tmp_path / "nowhere.json")


def test_edited_manifest_is_noticed(built):
    text = (built / DATA_MANIFEST).read_text()
    (built / DATA_MANIFEST).write_text(text.replace('"weight": 1.0', '"weight": 3.0'))
    with pytest.raises(ArtifactMismatchError, match="it was changed or damaged"):
        read_data_manifest(built)


def test_name_checksum_is_read_too(built):
    def rename(content):
        for shard in content["shards"]:
            shard["checksum"] = shard.pop("sha256")

    before = read_data_manifest(built).shards
    rewrite(built, rename)
    content = json.loads((built / DATA_MANIFEST).read_text())
    content["checksum"] = content.pop("sha256")
    (built / DATA_MANIFEST).write_text(json.dumps(content))
    assert read_data_manifest(built).shards == before


def test_paths_stay_inside_the_folder():
    assert is_inner_path("a/b.bin")
    assert not any(map(is_inner_path, ["", "/a", "a/../b", "..", "C:/a", "a\\b", "a\0", 3, None]))


def damage(path, place=5):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("break_it", "message", "is_quick"),
    [
        (lambda f: damage(f / "shard-00000.bin"), r"shard-00000\.bin: content sha256:\w+ is not the", False),
        (lambda f: damage(f / "shard-00001.ends", 0), r"shard-00001\.ends: content", False),
        (lambda f: (f / "shard-00001.bin").unlink(), r"shard-00001\.bin: missing", True),
        (lambda f: (f / "shard-00001.ends").unlink(), r"shard-00001\.ends: missing", True),
        (lambda f: (f / "shard-00000.bin").write_bytes(b"1234"), "4 bytes, but num_tokens=", True),
        (
            lambda f: (f / "shard-00000.mask").write_bytes(b"\1" * 107),
            r"shard-00000\.mask: is not in the manifest",
            True,
        ),
        (lambda f: rewrite(f, shard_change(num_documents=5)), "documents, num_documents=5", True),
    ],
)
def test_damaged_data_are_not_opened(built, break_it, message, is_quick):
    assert verify_data(read_data_manifest(built)).faults == ()
    break_it(built)
    with pytest.raises(ArtifactMismatchError, match=message):
        open_data(built, sequence_length=8)
    assert bool(verify_data(read_data_manifest(built), contents=False).faults) is is_quick


def test_link_that_leaves_the_folder_is_refused(built, tmp_path):
    outside = tmp_path / "elsewhere.bin"
    (built / "shard-00000.bin").rename(outside)
    (built / "shard-00000.bin").symlink_to(outside)
    assert "leads out of the folder" in verify_data(read_data_manifest(built)).faults[0]


def test_ids_beyond_the_vocabulary_are_found_by_verify(built):
    faults = verify_data(read_data_manifest(built), vocab_size=100).faults
    assert len(faults) == 2 and "is id 126; ids lie in 0 to 99" in faults[0]


def test_data_must_fit_the_model(built, tokenizer):
    open_data(built, sequence_length=8, vocab_size=266, tokenizer_checksum=tokenizer.checksum)
    with pytest.raises(ArtifactMismatchError, match="made with a vocabulary of 266, the model has 200"):
        open_data(built, sequence_length=8, vocab_size=200)
    with pytest.raises(ArtifactMismatchError, match="made with the tokenizer sha256:.*the model's is sha256:0"):
        open_data(built, sequence_length=8, tokenizer_checksum="sha256:" + "0" * 64)
    rewrite(built, lambda content: content.pop("tokenizer"))
    with pytest.raises(InvalidConfigError, match="records no pad_token_id"):
        open_data(built, sequence_length=8)


def test_raw_shards_are_not_opened_for_training(built):
    rewrite(built, shard_change(format="jsonl_text"))
    with pytest.raises(InvalidConfigError, match=r"shards\[0\].format='jsonl_text'.*cognexis data build"):
        open_data(built, sequence_length=8)


# ---- size ----

MEASURE = """
import resource
import sys
from pathlib import Path
import numpy as np
from cognexis.training.data.blocks import TokenRows
from cognexis.training.data.packing import Packing
from cognexis.training.data.sources import JsonlSource
from cognexis.training.data.token_shard import TokenShard
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = TokenRows(TokenShard(folder / "big.bin"), Packing(2048, 0))
for index in np.linspace(0, len(rows) - 1, 200).astype(int).tolist():
    rows[index]
lines = JsonlSource(folder / "big.jsonl", longest=2**20).read()
reasons = [record.content.reason if hasattr(record.content, "reason") else "fine" for record in lines]
print(len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, reasons)
"""


@pytest.mark.slow
def test_files_of_a_gigabyte_are_read_in_little_memory(tmp_path):
    tokens = 2**28
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(4 * tokens)
    np.arange(2**16, tokens + 1, 2**16).astype("<u8").tofile(tmp_path / "big.ends")
    with open(tmp_path / "big.jsonl", "wb") as file:  # a sparse line of 200 MB between two records
        file.write(b'{"text": "a"}\n')
        file.truncate(200 * 2**20)
        file.seek(0, 2)
        file.write(b'\n{"text": "b"}\n')
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count, kilobytes, reasons = printed.split(maxsplit=2)
    assert int(count) == -(-tokens // 2049) and reasons.strip() == "['fine', 'too_long', 'fine']"
    assert int(kilobytes) < 64 * 1024
