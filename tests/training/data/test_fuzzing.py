"""Whatever a file holds, it becomes documents or counted faults, and never anything else."""

import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cognexis.errors import ArtifactMismatchError, CognexisError
from cognexis.training.data.corruption import REASONS, FaultHandler, RecordCounts
from cognexis.training.data.manifest import DATA_MANIFEST, canonical_checksum, read_data_manifest
from cognexis.training.data.pipeline import DocumentPipeline
from cognexis.training.data.sources import JsonlSource

_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # the folder is written anew; shared machines
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x", "end|>\n<|user"]) | _JSON},
    optional={"content": st.text(max_size=20) | st.just("<|end|>") | _JSON, "tool_calls": _JSON, "name": _JSON},
)
_RECORD = st.one_of(
    st.fixed_dictionaries({"text": st.text(max_size=40) | _JSON}),
    st.fixed_dictionaries(
        {"input_ids": st.lists(st.integers(0, 265), max_size=9) | _JSON}, optional={"loss_mask": _JSON}
    ),
    st.fixed_dictionaries(
        {"messages": st.lists(_MESSAGE, max_size=4) | _JSON},
        optional={"system": _JSON, "metadata": _JSON, "tools": _JSON},
    ),
    _JSON,
)


def as_line(record: object) -> bytes:
    return json.dumps(record).encode()


def broken(line: bytes, place: int, byte: int) -> bytes:
    place %= len(line) + 1
    return line[:place] + bytes([byte]) + line[place + byte % 2 :]


_LINE = st.one_of(
    _RECORD.map(as_line),
    st.binary(max_size=40),
    st.builds(broken, _RECORD.map(as_line), st.integers(0), st.integers(0, 255)),
)


def check_lines(lines: list[bytes], folder, tokenizer) -> None:
    path = folder / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    counts, rows = RecordCounts(), []
    handler = FaultHandler("quarantine", counts, rows.append)
    pipeline = DocumentPipeline(tokenizer)
    control = set(range(10))
    for record, document in pipeline.documents(JsonlSource(path, longest=500).read(), handler):
        assert 0 < record.next_position <= path.stat().st_size
        if document is None:
            continue
        assert document.tokens[-1] == 4 and all(type(token) is int and 0 <= token < 266 for token in document.tokens)
        assert document.is_target is None or len(document.is_target) == len(document.tokens)
        content = record.content
        if "text" in content:
            assert not control & set(document.tokens[1:-1]) and document.is_target is None
    assert counts.read == counts.loaded + counts.empty + sum(counts.skipped.values())
    assert counts.read <= path.read_bytes().count(b"\n") + 1
    assert len(rows) == sum(counts.skipped.values()) and {row["reason"] for row in rows} <= set(REASONS)


@given(lines=st.lists(_LINE, max_size=6))
@settings(max_examples=150, suppress_health_check=_CHECKS)
def test_any_lines_become_documents_or_counted_faults(lines, tmp_path, tokenizer):
    check_lines(lines, tmp_path, tokenizer)


@pytest.mark.slow
@given(lines=st.lists(_LINE, max_size=6))
@settings(max_examples=2000, suppress_health_check=_CHECKS)
def test_very_many_lines_become_documents_or_counted_faults(lines, tmp_path, tokenizer):
    check_lines(lines, tmp_path, tokenizer)


_ENTRY = {
    "path": "a.bin",
    "format": "token_ids_u32",
    "num_documents": 1,
    "num_tokens": 2,
    "sha256": "sha256:" + "0" * 64,
    "weight": 1.0,
    "domain": "",
    "companions": {},
}


def test_manifest_with_a_lone_surrogate_is_refused_by_its_checksum(tmp_path):
    (tmp_path / DATA_MANIFEST).write_text(
        json.dumps({"schema_version": 1, "shards": [_ENTRY | {"domain": "\ud800"}], "sha256": "sha256:" + "0" * 64})
    )
    with pytest.raises(ArtifactMismatchError, match="it was changed or damaged"):
        read_data_manifest(tmp_path)


@given(
    key=st.sampled_from([*_ENTRY, "other"]), value=_JSON, top=st.dictionaries(st.text(max_size=8), _JSON, max_size=1)
)
@settings(max_examples=200, suppress_health_check=_CHECKS)
def test_any_manifest_is_read_or_refused_with_a_reason(key, value, top, tmp_path):
    content = {"schema_version": 1, "shards": [_ENTRY | {key: value}], **top}
    assume("Infinity" not in json.dumps(content))  # no checksum can be made of it
    (tmp_path / DATA_MANIFEST).write_text(json.dumps(content | {"sha256": canonical_checksum(content)}))
    reason = ""
    try:
        weight = read_data_manifest(tmp_path).content()["shards"][0]["weight"]
    except CognexisError as error:
        reason = str(error)
    assert DATA_MANIFEST in reason or (not reason and weight > 0)
