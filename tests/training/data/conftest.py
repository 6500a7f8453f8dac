"""A tokenizer whose ids are known, and files of each kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cognexis.artifacts.tokenizer_training import byte_reference_tokenizer
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.training.data.build import BuildOrder, build_data
from cognexis.training.data.inputs import DataInput
from cognexis.training.data.manifest import DataManifest


@pytest.fixture(scope="session")
def tokenizer() -> CognexisTokenizer:
    """Bytes are 10 and up; <s> 0, <pad> 2, <eod> 4."""
    return byte_reference_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write records, or lines of bytes as they are, into a file."""

    def write(records: list[Any], name: str = "records.jsonl") -> Path:
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def build(tmp_path: Path, tokenizer: CognexisTokenizer) -> Callable[..., dict[str, DataManifest]]:
    """Build one input, or several, into tmp_path/out."""

    def run(source: Any, restart: bool = False, **settings: Any) -> dict[str, DataManifest]:
        given = source if isinstance(source, list) else [source]
        inputs = [item if isinstance(item, DataInput) else DataInput(item) for item in given]
        order = BuildOrder(**{"inputs": inputs, "output_dir": tmp_path / "out", "tokenizer": tokenizer, **settings})
        return build_data(order, restart=restart)

    return run
