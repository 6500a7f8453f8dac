"""Building: the same tokens from every format, policies, resumption, and faults before anything is written."""

import gzip
import hashlib
import json
import os
import random
import signal

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cognexis.errors import ArtifactMismatchError, CheckpointError, InvalidConfigError
from cognexis.training.data.build import BuildOrder, build_data
from cognexis.training.data.corruption import FaultHandler, RecordCounts
from cognexis.training.data.inputs import DataInput
from cognexis.training.data.manifest import read_data_manifest
from cognexis.training.data.pipeline import STAGES, DocumentPipeline
from cognexis.training.data.sources import JsonlSource
from cognexis.training.data.verify import open_shard, verify_data
from cognexis.training.data.views import iterable_documents

BOS, PAD, EOD = 0, 2, 4


def ids_of(text: str) -> list[int]:
    return [BOS, *(10 + byte for byte in text.encode()), EOD]


def documents(manifest) -> list[list[int]]:
    shards = [open_shard(manifest, entry) for entry in manifest.shards]
    return [shard.document(index).tolist() for shard in shards for index in range(shard.num_documents)]


def masks(manifest) -> list[list[int]]:
    found = []
    for entry in manifest.shards:
        shard = open_shard(manifest, entry)
        found += [shard.mask[slice(*shard.document_range(index))].tolist() for index in range(shard.num_documents)]
    return found


def tree(folder) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- formats ----

TEXTS = ["hi Σ", "line one\nline two\r\n\tindented", "x" * 300]


def sources_of(folder) -> dict[str, object]:
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    ids = [[*ids_of(text)][:-1] for text in TEXTS]
    (folder / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    (folder / "texts").mkdir()
    for index, text in enumerate(TEXTS):
        (folder / "texts" / f"{index}.txt").write_bytes(text.encode())
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(str(folder / "saved"))
    names = ["a.jsonl", "a.jsonl.gz", "ids.jsonl", "a.parquet", "a.arrow", "texts", "saved"]
    return {name: folder / name for name in names} | {"dataset": dataset}


def test_every_format_gives_the_same_tokens(tmp_path, tokenizer, build):
    expected = [ids_of(text) for text in TEXTS]
    for name, source in sources_of(tmp_path).items():
        manifest = build(source, output_dir=tmp_path / f"out-{name}")[""]
        assert documents(manifest) == expected, name
        assert (manifest.num_documents, manifest.num_tokens) == (3, sum(map(len, expected)))
        streamed = list(iterable_documents([DataInput(source)], tokenizer))
        assert [row["input_ids"] for row in streamed] == expected, name
        assert streamed[0]["loss_mask"] == [1] * len(expected[0])


def test_totals_of_three_documents(write_jsonl, build):
    manifest = build(write_jsonl([{"input_ids": [10] * n} for n in (2, 3, 4)]), add_bos=False)[""]
    assert (manifest.num_documents, manifest.num_tokens) == (3, 12)
    assert manifest.counts == {"read": 3, "loaded": 3, "empty": 0, "skipped": {}, "filtered": {}}
    assert read_data_manifest(manifest.folder).checksum == manifest.checksum


def test_document_that_ends_with_the_end_token_gets_no_second_one(write_jsonl, build):
    manifest = build(write_jsonl([{"token_ids": [11, EOD]}, {"input_ids": [12, EOD, 13]}]))[""]
    assert documents(manifest) == [[11, EOD], [12, EOD, 13, EOD]]


def test_reading_can_begin_at_any_record(tmp_path):
    from cognexis.training.data.inputs import open_inputs

    for source in sources_of(tmp_path).values():
        records = list(open_inputs([DataInput(source)])[0].source.read())
        assert [record.place.number for record in records] == (
            [1, 3, 5] if str(source).endswith("a.jsonl") else [1, 2, 3]
        )
        for skipped, record in enumerate(records[:-1], start=1):
            again = list(open_inputs([DataInput(source)])[0].source.read(record.next_position))
            assert again == records[skipped:]


# ---- the order of the stages ----


def test_stages_of_a_text_and_of_a_chat(write_jsonl, tokenizer):
    for record, expected in [
        ({"text": "hello"}, ["parse", "filter", "encode", "end"]),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, ["parse", "filter", "format", "encode", "end"]),
    ]:
        seen: list[str] = []
        pipeline = DocumentPipeline(tokenizer, trace=seen.append, filters=[lambda text: None])
        source = JsonlSource(write_jsonl([record]))
        list(pipeline.documents(source.read(), FaultHandler("fail", RecordCounts())))
        assert seen == expected == [stage for stage in STAGES if stage in expected]


def test_filters_see_text_before_it_is_encoded(write_jsonl, build):
    path = write_jsonl([{"text": "a"}, {"text": "bad word"}, {"text": ""}, {"text": "fine text"}, {"text": "x" * 50}])
    settings = {"min_characters": 2, "max_characters": 20}
    manifest = build(path, filters=[lambda text: "bad" if "bad" in text else None], **settings)[""]
    assert documents(manifest) == [ids_of("fine text")]
    assert manifest.counts["filtered"] == {"bad": 1, "too_long": 1, "too_short": 1} and manifest.counts["empty"] == 1


# ---- corrupt records ----

GOLDEN = [{"text": "good"}, b"not json", {"token_ids": [11, 12]}, {"text": "a <|system|> b"}]


def test_first_bad_record_ends_the_build_and_nothing_is_left(tmp_path, write_jsonl, build):
    before = tree(tmp_path)
    with pytest.raises(InvalidConfigError, match=r"records\.jsonl, line 2: the record is no strict JSON"):
        build(write_jsonl(GOLDEN))
    assert set(tree(tmp_path)) == {*before, "records.jsonl"}


def test_quarantine_names_places_and_reasons_without_content(tmp_path, write_jsonl, build):
    path = write_jsonl(GOLDEN)
    manifest = build(path, policy="quarantine")[""]
    assert manifest.counts == {
        "read": 4,
        "loaded": 2,
        "empty": 0,
        "skipped": {"control_token": 1, "invalid_json": 1},
        "filtered": {},
    }
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert rows == [
        {"path": str(path), "line_number": 2, "byte_offset": 17, "reason": "invalid_json"},
        {"path": str(path), "line_number": 4, "byte_offset": 50, "reason": "control_token"},
    ]
    assert documents(manifest) == [ids_of("good"), [11, 12, EOD]]


def test_skip_counts_and_writes_no_rows(tmp_path, write_jsonl, build):
    assert build(write_jsonl(GOLDEN), policy="skip")[""].counts["loaded"] == 2
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b'{"text": "cut off', "no strict JSON"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10 of the line"),
        (b"[1, 2]", "must be one object: got list"),
        (b'{"text": "a", "text": "b"}', "the key 'text' is given twice"),
        (b'{"text": "a", "score": NaN}', "the number NaN is not finite"),
        (b'{"text": "a\x00b"}', "no strict JSON"),
        (b"{" * 3000, "no strict JSON"),
        ({"txt": "a"}, "exactly one of text, input_ids and messages: found none"),
        ({"text": "a", "input_ids": [11]}, "found text, input_ids"),
        ({"text": 5}, "text must be a str, got int"),
        ({"input_ids": "11"}, "input_ids must be a list, got str"),
        ({"input_ids": [11, 266]}, "266 at 1; ids lie in 0 to 265"),
        ({"input_ids": [11, -1]}, "-1 at 1"),
        ({"input_ids": [11, True]}, "True at 1"),
        ({"input_ids": [11, 1.0]}, "1.0 at 1"),
        ({"input_ids": [11, 12], "loss_mask": [1]}, "loss_mask must be 2 times 0 or 1"),
        ({"input_ids": [11, 12], "loss_mask": [1, 0]}, "nothing in the record is to be learned"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"text": "</s>"}, "control token: </s>"),
        ({"text": "y" * 5000}, "longer than is read: more than 4096 bytes"),
        ({"messages": "hi"}, "messages must be a list, got str"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the assistant says nothing"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "the assistant says nothing"),
        ({"messages": [{"role": "assistant", "content": "<|end|>"}]}, "control token"),
        ({"messages": [{"role": "assistant", "content": "x"}], "metadata": 3}, "metadata must be an object"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}]}, "one system message at most"),
        ({"system": 1, "messages": [{"role": "assistant", "content": "b"}]}, "system must be a string"),
        (
            {"messages": [{"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments must be one JSON object",
        ),
    ],
)
def test_bad_record_is_named_by_file_line_and_rule(write_jsonl, build, record, message):
    path = write_jsonl([{"text": "fine"}, b"", record, {"text": "fine, too"}])
    with pytest.raises(InvalidConfigError, match=r"records\.jsonl, line 3: .*" + message.replace("(", r"\(")):
        build(path, longest_record=4096)
    manifest = build(path, policy="skip", longest_record=4096)[""]
    assert (manifest.counts["read"], manifest.counts["loaded"]) == (3, 2)


def test_control_strings_can_be_taken_for_letters(write_jsonl, build):
    manifest = build(DataInput(write_jsonl([{"text": "a<eod>"}]), on_control="text"))[""]
    assert documents(manifest) == [ids_of("a<eod>")]


def test_compressed_file_that_is_cut_off_is_one_fault_at_its_end(tmp_path, write_jsonl, build):
    lines = write_jsonl([{"text": f"document {index} {random.random()}"} for index in range(500)]).read_bytes()
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:4000])
    with pytest.raises(InvalidConfigError, match=r"cut\.jsonl\.gz, line \d+: the file ends in the middle of a record"):
        build(path)
    counts = build(path, policy="skip")[""].counts
    assert counts["skipped"] == {"cut_off": 1} and 0 < counts["loaded"] < 500


# ---- chats ----

CHAT = [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]


def learned(manifest, tokenizer) -> list[str]:
    pairs = zip(documents(manifest), masks(manifest), strict=True)
    return [tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m]) for ids, mask in pairs]


def test_only_what_the_assistant_says_is_learned(tmp_path, write_jsonl, build, tokenizer):
    more = [{"role": "user", "content": "Again"}, {"role": "assistant", "content": "hi there"}]
    path = write_jsonl(
        [{"messages": CHAT}, {"system": "Be brief.", "messages": CHAT + more, "metadata": {"task": "x"}}]
    )
    manifest = build(path)[""]
    assert learned(manifest, tokenizer) == ["hi<|end|>", "hi<|end|>hi there<|end|>"]
    assert [tokenizer.decode(ids) for ids in documents(manifest)][1] == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nSay hi<|end|>\n<|assistant|>\nhi<|end|>\n"
        "<|user|>\nAgain<|end|>\n<|assistant|>\nhi there<|end|>\n<eod>"
    )
    without_end = build(path, learn_end=False, output_dir=tmp_path / "b")[""]
    assert learned(without_end, tokenizer) == ["hi", "hihi there"]
    everything = build(path, learned="all", output_dir=tmp_path / "c")[""]
    assert all(mask == [1] * (len(mask) - 1) + [0] for mask in masks(everything))


def test_texts_and_chats_share_a_shard(write_jsonl, build, tokenizer):
    manifest = build(write_jsonl([{"text": "abc"}, {"messages": CHAT}, {"text": "d"}]))[""]
    assert learned(manifest, tokenizer) == ["<s>abc<eod>", "hi<|end|>", "<s>d<eod>"]


def test_chats_in_arrow_tables_are_read_alike(tmp_path, write_jsonl, build):
    rows = [{"messages": CHAT, "metadata": {"task": "a"}}, {"messages": CHAT[1:], "metadata": {"task": "b"}}]
    from_table = build(datasets.Dataset.from_list(rows))[""]
    from_lines = build(write_jsonl(rows), output_dir=tmp_path / "lines")[""]
    assert documents(from_table) == documents(from_lines) and masks(from_table) == masks(from_lines)


# ---- shards, splits, domains ----


def many(count: int) -> list[dict[str, str]]:
    return [{"text": f"document {index} " + "word " * (index % 7)} for index in range(count)]


def test_shards_end_at_their_size_and_keep_the_order(write_jsonl, build):
    manifest = build(write_jsonl(many(100)), shard_tokens=500)[""]
    sizes = [shard.num_tokens for shard in manifest.shards]
    assert len(sizes) > 3 and all(500 <= size < 560 for size in sizes[:-1])
    assert documents(manifest) == [ids_of(record["text"]) for record in many(100)]
    assert verify_data(manifest).faults == ()


def test_held_out_documents_go_by_their_content(tmp_path, write_jsonl, build):
    both = build(write_jsonl(many(400) + many(400)), validation_share=0.1, shard_tokens=4000)
    train, held_out = documents(both["train"]), documents(both["validation"])
    assert len(train) + len(held_out) == 800 and 40 <= len(held_out) <= 130
    assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in held_out}
    assert read_data_manifest(tmp_path / "out" / "train").num_documents == len(train)


def test_domains_and_weights_are_recorded_and_never_share_a_shard(write_jsonl, build):
    first = write_jsonl(many(3), "a.jsonl")
    second = write_jsonl(many(2), "b.jsonl")
    third = write_jsonl(many(4), "c.jsonl")
    manifest = build(
        [DataInput(first, domain="x"), DataInput(second, domain="x"), DataInput(third, "auto", "y/z", 2.5)]
    )
    found = [(s.path, s.domain, s.weight, s.num_documents) for s in manifest[""].shards]
    assert found == [("x-00000.bin", "x", 1.0, 5), ("y_z-00001.bin", "y/z", 2.5, 4)]


def test_manifest_of_raw_shards_can_be_built(tmp_path, write_jsonl, build):
    from cognexis.checkpoints.hashing import file_checksum
    from cognexis.training.data.manifest import DATA_MANIFEST, DataManifest, ShardEntry

    path = write_jsonl(many(3), "raw.jsonl")
    entry = ShardEntry(path.name, "jsonl_text", 3, None, file_checksum(path), weight=2.0, domain="d")
    DataManifest((entry,), tmp_path).write(tmp_path / DATA_MANIFEST)
    made = build(tmp_path / DATA_MANIFEST)[""].shards[0]
    assert (made.num_documents, made.weight, made.domain) == (3, 2.0, "d")
    path.write_bytes(path.read_bytes().replace(b"word", b"ward"))
    with pytest.raises(ArtifactMismatchError, match=r"raw\.jsonl: content sha256:\w+ is not"):
        build(tmp_path / DATA_MANIFEST, output_dir=tmp_path / "again")


# ---- interruption ----


def interrupted_build(path, tokenizer, out, records: int, how: str) -> None:
    """Build in a child process that dies after so many documents, or at its end if there are fewer.

    ``between`` dies when the quarantine rows are written and the progress is not.
    """
    child = os.fork()
    if child == 0:
        from cognexis.training.data import build as module

        count = 0
        add = module._Build._add

        def dying_add(self, document, weighted):
            nonlocal count
            add(self, document, weighted)
            count += 1
            if count == records:
                os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else os._exit(1)

        def dying_write(path, content):
            nonlocal count
            count += 1
            if count == records and path.name == "progress.json":
                os._exit(1)
            write_json(path, content)

        if how == "between":
            write_json, module.write_json = module.write_json, dying_write
        else:
            module._Build._add = dying_add
        try:
            order = BuildOrder([DataInput(path)], out, tokenizer, "quarantine", shard_tokens=300, validation_share=0.2)
            module.build_data(order)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.slow
def test_killed_builds_go_on_and_give_the_same_bytes(tmp_path, write_jsonl, tokenizer, build):
    records = many(60)
    for place in (7, 30, 44):
        records.insert(place, b"broken")
        records.insert(place + 2, {"text": ""})
    path = write_jsonl(records)
    settings = {"policy": "quarantine", "shard_tokens": 300, "validation_share": 0.2}
    build(path, output_dir=tmp_path / "whole", **settings)
    generator = random.Random(0)
    for trial in range(3):
        out = tmp_path / f"trial-{trial}"
        for how in ("kill", "between", "exit"):
            most = 4 if how == "between" else 30
            interrupted_build(path, tokenizer, out, generator.randrange(1, most), how)
        if not out.exists():
            build(path, output_dir=out, **settings)
        assert tree(out) == tree(tmp_path / "whole")
        assert not out.with_name(f".{out.name}.building").exists()


def test_failing_disk_leaves_what_counts_and_the_build_goes_on(tmp_path, write_jsonl, tokenizer, build, monkeypatch):
    from cognexis.training.data.shard_writer import TokenShardWriter

    path = write_jsonl(many(60))
    build(path, output_dir=tmp_path / "whole", shard_tokens=300)
    add, count = TokenShardWriter.add, iter(range(10**6))

    def full_disk(self, *arguments):
        if next(count) == 25:
            raise OSError(28, "No space left on device")
        add(self, *arguments)

    monkeypatch.setattr(TokenShardWriter, "add", full_disk)
    with pytest.raises(CheckpointError, match=r"out: cannot be written: No space left on device; .*\.out\.building"):
        build(path, shard_tokens=300)
    assert not (tmp_path / "out").exists()
    lines: list[str] = []
    build_data(BuildOrder([DataInput(path)], tmp_path / "out", tokenizer, shard_tokens=300), lines.append)
    assert lines[0].startswith("going on after ") and tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_unfinished_build_with_other_settings_is_refused_unless_restarted(tmp_path, write_jsonl, tokenizer, build):
    path = write_jsonl(many(60))
    interrupted_build(path, tokenizer, tmp_path / "out", 40, "exit")
    with pytest.raises(ArtifactMismatchError, match="holds an unfinished build with other settings"):
        build(path, policy="skip")
    assert (tmp_path / ".out.building" / "progress.json").exists()
    build(path, policy="skip", restart=True)


def test_two_builds_of_one_folder_exclude_each_other(tmp_path, write_jsonl, build):
    from cognexis.training.data.build import _locked

    staging = tmp_path / ".out.building"
    staging.mkdir()
    with _locked(staging), pytest.raises(CheckpointError, match="another process is building this data"):
        build(write_jsonl(many(2)))


# ---- bad settings and inputs ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "ignore"}, "corruption_policy='ignore': must be one of fail, skip, quarantine"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"validation_share": 1.0}, "validation_share=1.0: must be 0 or in"),
        ({"validation_share": float("nan")}, "validation_share=nan"),
        ({"min_characters": -1}, "min_characters=-1"),
        ({"max_characters": "9"}, "max_characters='9'"),
        ({"learned": "user"}, "learned='user': must be one of assistant, all"),
        ({"inputs": []}, "inputs: must name at least one"),
        ({"tokenizer": object()}, "tokenizer: must be a CognexisTokenizer"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, write_jsonl, build, settings, message):
    path = write_jsonl(many(2))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidConfigError, match=message):
        build(path, **settings)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_inputs_are_refused_before_anything_is_written(tmp_path, write_jsonl, build):
    good = write_jsonl(many(2))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no footer")
    (tmp_path / "x.arrow").write_bytes(b"ARROW? no")
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "x.weird").write_text("text")
    (tmp_path / "empty").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "y.parquet")
    before = sorted(tmp_path.rglob("*"))
    for source, message in [
        (tmp_path / "missing.jsonl", r"missing\.jsonl: no such file"),
        (tmp_path / "x.parquet", r"x\.parquet: no readable Parquet file"),
        (tmp_path / "x.arrow", r"x\.arrow: no readable Arrow file"),
        (tmp_path / "x.jsonl.gz", r"x\.jsonl\.gz: cannot be read"),
        (tmp_path / "x.weird", r"x\.weird: its name does not tell the format; give one of text, jsonl_text"),
        (tmp_path / "empty", "holds no file of a known format"),
        (tmp_path / "y.parquet", r"y\.parquet: needs exactly one of the columns .*; has body"),
        (datasets.Dataset.from_dict({"text": ["a"], "messages": ["b"]}), "needs exactly one of the columns"),
        (DataInput(good, "jsonl"), r"format='jsonl': must be one of .*did you mean"),
        (DataInput(good, weight=0), "weight=0: must be a finite number above 0"),
        (DataInput(good, weight=float("inf")), "weight=inf"),
        (DataInput(good, on_control="keep"), "on_control='keep'"),
    ]:
        with pytest.raises(InvalidConfigError, match=message):
            build([good, source])
    assert sorted(tmp_path.rglob("*")) == before


def test_output_that_exists_is_refused(tmp_path, write_jsonl, build):
    path = write_jsonl(many(2))
    build(path)
    with pytest.raises(InvalidConfigError, match="output_dir=.*exists already"):
        build(path)


def test_data_without_any_document_are_refused(tmp_path, write_jsonl, build):
    with pytest.raises(InvalidConfigError, match=r"no document for the shards in 2 records \(1 empty, 1 too_short\)"):
        build(write_jsonl([{"text": ""}, {"text": "a"}]), min_characters=5)
    assert not (tmp_path / "out").exists()
