"""Text as rows of equal length: documents one after another, cut into rows of T + 1 tokens for T predictions.

With rows of one length the mean over rows is the mean over tokens, so a row is an example of the bootstrap. A file is
JSONL with ``{"text": ...}`` or ``{"input_ids": [...]}`` per line, or plain text as one document. Control strings
inside a text are plain text. Tokens at the end that fill no row are dropped.
"""

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from cognexis.checkpoints.json_file import parse_strict_json
from cognexis.errors import InvalidConfigError


def read_text_rows(path: Path, tokenizer: Any, length: int, vocab_size: int) -> Tensor:
    """Rows ``[R, length + 1]`` of a file.

    Raises:
        InvalidConfigError: the file is missing or of another kind, a line is damaged, an id lies outside the
            vocabulary, or there is less than one row; names the line.
    """
    if path.suffix not in (".jsonl", ".txt") or not path.is_file():
        raise InvalidConfigError(f"path={str(path)!r}: must be a file .jsonl or .txt", path="path", value=str(path))
    documents = [path.read_text("utf-8")] if path.suffix == ".txt" else _documents(path)
    end = tokenizer.convert_tokens_to_ids("<eod>")
    stream: list[int] = []
    for number, document in enumerate(documents, start=1):
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


def _documents(path: Path) -> list[str | list[int]]:
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
