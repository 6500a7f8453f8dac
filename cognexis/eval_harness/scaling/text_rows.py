"""Text as rows of equal length: documents one after another, cut into rows of T + 1 tokens for T predictions.

With rows of one length the mean over rows is the mean over tokens, so a row is an example of the bootstrap. Sources:

    name.jsonl            {"text": ...} or {"input_ids": [...]} per line
    name.txt              one document
    data_manifest.json    or its folder: token shards or JSONL, as `cognexis data build` leaves them
    quickstart-held-out   the files of Python's standard library that the quickstart does not train on

Control strings inside a text are plain text. Tokens at the end that fill no row are dropped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from cognexis.artifacts.run_config.other_sections import HELD_OUT_TEXT
from cognexis.artifacts.text_corpus import standard_library_corpus
from cognexis.checkpoints.json_file import parse_strict_json
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.shard_documents import DATA_MANIFEST, shard_documents

HELD_OUT_CHARACTERS, HELD_OUT_SHARE = 4_000_000, 0.05
"""The quickstart's corpus and the share of its files that it holds out."""


def read_text_rows(path: Path, tokenizer: Any, length: int, vocab_size: int) -> Tensor:
    """Rows ``[R, length + 1]`` of a source.

    Raises:
        InvalidConfigError: the source is missing or of another kind, a line is damaged, an id lies outside the
            vocabulary, or there is less than one row; names the line.
        ArtifactMismatchError: a manifest or shard was changed, or its tokens are those of another tokenizer.
    """
    end = tokenizer.convert_tokens_to_ids("<eod>")
    stream: list[int] = []
    for number, document in enumerate(_documents(path, tokenizer), start=1):
        if isinstance(document, str):
            ids = tokenizer(document, add_special_tokens=False, split_special_tokens=True).input_ids
            document = [tokenizer.bos_token_id, *ids, end]
        stream += document
        if wrong := [token for token in document if not 0 <= token < vocab_size]:
            raise InvalidConfigError(f"{path}: line {number}: id {wrong[0]} must be 0 to {vocab_size - 1}")
    num_rows = len(stream) // (length + 1)
    if not num_rows:
        raise InvalidConfigError(f"{path}: {len(stream)} tokens; a row needs {length + 1}")
    return torch.tensor(stream[: num_rows * (length + 1)]).view(num_rows, length + 1)


def _documents(path: Path, tokenizer: Any) -> Iterator[str | list[int]]:
    if str(path) == HELD_OUT_TEXT:
        yield from standard_library_corpus(HELD_OUT_CHARACTERS).split(HELD_OUT_SHARE)[1].documents
    elif path.name == DATA_MANIFEST or (path / DATA_MANIFEST).is_file():
        yield from shard_documents(path / DATA_MANIFEST if path.is_dir() else path, tokenizer, read_lines)
    elif path.suffix == ".txt" and path.is_file():
        yield path.read_text("utf-8")
    elif path.suffix == ".jsonl" and path.is_file():
        yield from read_lines(path)
    else:
        raise InvalidConfigError(
            f"path={str(path)!r}: must be a file .jsonl or .txt, a folder with {DATA_MANIFEST}, or {HELD_OUT_TEXT}",
            path="path",
            value=str(path),
        )


def read_lines(path: Path) -> list[str | list[int]]:
    """The documents of a JSONL file: texts, and ids of tokens.

    Raises:
        InvalidConfigError: a line is damaged; names it.
    """
    documents: list[str | list[int]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):

        def refuse(reason: str, number: int = number) -> NoReturn:
            raise InvalidConfigError(f"{path}: line {number}: {reason}")

        content = parse_strict_json(line, refuse)
        text = content.get("text") if isinstance(content, dict) else None
        ids = content.get("input_ids") if isinstance(content, dict) else None
        if isinstance(text, str):
            documents.append(text)
        elif isinstance(ids, list) and all(type(token) is int for token in ids):
            documents.append(ids)
        else:
            refuse('must be {"text": ...} or {"input_ids": [integers]}')
    return documents
