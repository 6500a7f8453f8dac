"""Reading: both formats agree, and nothing hostile gets past the reader or takes long."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cognexis.artifacts.run_config.documents import parse_document, parse_value, read_document, yaml_text
from cognexis.errors import InvalidConfigError

BOMBS = {
    "deep flow list": (b"a: " + b"[" * 100_000, "nested more than 64 deep"),
    "deep flow mapping": (b"{a: " * 60_000, "nested more than 64 deep"),
    "deep block list": (b"- " * 100_000, "nested more than 64 deep"),
    "alias bomb": (b"a: &a [x]\nb: [*a, *a]\n", "anchors are not supported"),
    "alias without anchor": (b"a: *b\n", "aliases are not supported"),
    "python object": (b"a: !!python/object/apply:os.system [ls]\n", "tags are not supported"),
    "explicit text tag": (b"a: !!str 3\n", "tags are not supported"),
    "key twice": (b"a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is given twice"),
    "key that is a list": (b"? [a]\n: 3\n", "a key must be text"),
    "two documents": (b"a: 1\n---\nb: 2\n", "one file holds one document"),
    "many values": (b"a: [" + b"1," * 100_000 + b"]", "more than 50000 values"),
    "100 MB": (b"a: " + b"x" * 100_000_000, "larger than 262144 bytes"),
    "NaN": (b"a: .nan\n", "the number .nan is not finite"),
    "infinity": (b"a: -.inf\n", "the number -.inf is not finite"),
    "overflow": (b"a: 1e999\n", "the number 1e999 is not finite"),
    "digits": (b"a: " + b"1" * 5000, "Exceeds the limit"),
    "not UTF-8": (b"a: \xff\n", "not UTF-8"),
    "UTF-16": ("a: 1\n".encode("utf-16"), "not UTF-8"),
    "control character": (b"a: \x00\n", "not valid YAML"),
    "no mapping": (b"- 1\n", "must hold a mapping of sections, got list"),
    "empty": (b"", "must hold a mapping of sections, got NoneType"),
    "unclosed": (b"a: [1\n", "not valid YAML"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_yaml_is_refused_within_a_second(name: str, tmp_path: Path) -> None:
    data, reason = BOMBS[name]
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(InvalidConfigError) as caught:
        read_document(path)
    assert time.perf_counter() - start < 1
    assert str(caught.value).startswith("run.yaml: ") and reason in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "data", [b'{"a":' * 100_000, b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[1]", b"{" + b" " * 300_000 + b"}", b"{'a': 1}"]
)
def test_hostile_json_is_refused_within_a_second(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(InvalidConfigError, match="^run.json: "):
        read_document(path)
    assert time.perf_counter() - start < 1


def test_largest_ordinary_file_is_read_within_a_second() -> None:
    text = b"".join(b"key%d: value of %d\n" % (n, n) for n in range(9000))
    start = time.perf_counter()
    assert len(parse_document(text, is_yaml=True, name="x")) == 9000
    assert time.perf_counter() - start < 1.5


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        *(
            (word, word)
            for word in ("on", "yes", "no", "off", "y", "1_000", "0x10", "0o17", "1:30", "2026-01-01", "<<")
        ),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("[1, 2.0, x]", [1, 2.0, "x"]),
        ("{a: {b: null}}", {"a": {"b": None}}),
    ],
)
def test_scalar_means_what_version_1_2_says(text: str, value: Any) -> None:
    parsed = parse_value(text, "x")
    assert parsed == value and type(parsed) is type(value)


def test_what_is_written_is_read_back_with_the_same_types() -> None:
    texts = [
        "1e5",
        "1",
        "true",
        "null",
        "~",
        "on",
        "",
        ".nan",
        "*a",
        "&a",
        "!x",
        "- x",
        "a: b",
        "#",
        "ü😀",
        "a\nb",
        " x",
    ]
    document = {"texts": texts, "numbers": [1e-5, 1e300, 0.1, -0.0, 3, 10**30], "words": [None, True, False], "e": {}}
    for name, data in (("yaml", yaml_text(document)), ("json", json.dumps(document))):
        parsed = parse_document(data.encode(), is_yaml=name == "yaml", name="x")
        assert parsed == document
        assert [type(x) for x in parsed["numbers"]] == [type(x) for x in document["numbers"]]


def test_byte_order_mark_is_skipped() -> None:
    for data, is_yaml in ((b"\xef\xbb\xbfa: 1\n", True), (b'\xef\xbb\xbf{"a": 1}', False)):
        assert parse_document(data, is_yaml=is_yaml, name="x") == {"a": 1}


def test_source_is_a_path_or_text(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("a: 1\n")
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "a.txt").write_text('{"a": 1}')
    for source in (tmp_path / "a.yml", str(tmp_path / "a.json"), tmp_path / "a.txt", "a: 1", '{"a": 1}', b"a: 1\n"):
        assert read_document(source) == {"a": 1}
    for missing in ("nothing.yaml", tmp_path / "nothing.yaml", tmp_path, "a\0b"):
        with pytest.raises(InvalidConfigError, match="no such file|cannot be read"):
            read_document(missing)
    with pytest.raises(InvalidConfigError, match="not UTF-8"):
        read_document("a: \ud800\n")
