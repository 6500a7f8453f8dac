"""Rows of tokens with targets, read from JSONL.

One JSON object per line, in one of two forms:

    {"text": "..."}                                       tokenised; the target of a position is the token after it
    {"input_ids": [...]}                                  the same without a tokenizer
    {"input_ids": [...], "labels": [...]}                 labels_t is the target AT position t, -100 for none

So ``labels`` are not shifted: the loss at position t compares the logits of position t with labels_t. Either form may
carry ``"task"``, a name by which thresholds can differ. Other keys are left alone unless they look misspelt.

A row belongs to one of three splits by the checksum of its ids alone: 80 % train, 10 % validation, 10 % test. Equal
rows are in the same split, and every command that reads the same file sees the same splits.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from cognexis.checkpoints.hashing import file_checksums
from cognexis.checkpoints.json_file import parse_strict_json
from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError

IGNORED_LABEL = -100
SPLITS = ("train", "validation", "test")
_SPLIT_ENDS = (0.8, 0.9, 1.0)
_KEYS = ("text", "input_ids", "labels", "task")


@dataclass(frozen=True)
class DataRow:
    """One document.

    Attributes:
        name: where it stands, e.g. "line-17".
        input_ids: its tokens.
        targets: the target at each position, -100 for none; as long as ``input_ids``.
        task: its task, or None.
    """

    name: str
    input_ids: tuple[int, ...]
    targets: tuple[int, ...]
    task: str | None = None

    @property
    def split(self) -> str:
        """The split that the row belongs to."""
        digest = hashlib.sha256(",".join(map(str, self.input_ids)).encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        return next(name for name, end in zip(SPLITS, _SPLIT_ENDS, strict=True) if share < end)


@dataclass(frozen=True)
class DataFile:
    """The rows of one file.

    Attributes:
        path: as it was given.
        checksum: ``sha256:...`` of the content.
        rows: in the order of the file.
    """

    path: str
    checksum: str
    rows: tuple[DataRow, ...]


@dataclass(frozen=True)
class RowBatch:
    """Rows side by side, padded on the right.

    Attributes:
        input_ids: ``[B, T]``.
        is_real: ``[B, T]`` bool, False at padding.
        targets: ``[B, T]``, -100 where there is none.
        rows: the rows themselves.
    """

    input_ids: Tensor
    is_real: Tensor
    targets: Tensor
    rows: tuple[DataRow, ...]

    def to(self, device: torch.device) -> "RowBatch":
        """The batch on ``device``."""
        return RowBatch(self.input_ids.to(device), self.is_real.to(device), self.targets.to(device), self.rows)


def read_rows(
    path: Path,
    *,
    vocab_size: int,
    tokenizer: Any = None,
    max_length: int | None = None,
    num_rows: int | None = None,
    seed: int = 0,
) -> DataFile:
    """Read and check a file.

    Args:
        vocab_size: ids lie below it.
        tokenizer: for rows of text; None refuses them.
        max_length: longer rows are cut off behind so many tokens.
        num_rows: take so many rows, drawn by ``seed``; None takes all.

    Raises:
        InvalidConfigError: no such file, no row, or a row that breaks a rule; the message names the line.
    """
    if not path.is_file():
        raise InvalidConfigError(f"data={str(path)!r}: no such file", path="data", value=str(path))
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    if num_rows is not None and num_rows < len(lines):
        lines = [lines[i] for i in sorted(random.Random(seed).sample(range(len(lines)), num_rows))]
    if not lines:
        raise InvalidConfigError(f"data={str(path)!r}: holds no row", path="data", value=str(path))
    rows = tuple(_row(line, f"{path.name} line {n}", n, vocab_size, tokenizer, max_length) for n, line in lines)
    return DataFile(str(path), next(iter(file_checksums([path]))), rows)


def _row(line: bytes, where: str, number: int, vocab_size: int, tokenizer: Any, max_length: int | None) -> DataRow:
    def refuse(reason: str) -> NoReturn:
        raise InvalidConfigError(f"{where}: {reason}", path="data", reason=reason)

    content = parse_strict_json(line, refuse)
    if not isinstance(content, dict):
        refuse("must be one object")
    for key in content:
        if key not in _KEYS and (near := nearest_name(key, _KEYS, cutoff=0.8)):
            refuse(f"unknown key {key!r}{near}")
    if ("text" in content) == ("input_ids" in content):
        refuse("needs either text or input_ids")
    if "text" in content:
        if "labels" in content:
            refuse("labels go with input_ids")
        if tokenizer is None:
            refuse("holds text, and the checkpoint has no tokenizer")
        if not isinstance(content["text"], str):
            refuse("text must be a string")
        ids = tokenizer.encode_untrusted(content["text"])
    else:
        ids = _ids(content["input_ids"], "input_ids", 0, vocab_size, refuse)
    ids = ids[:max_length]
    if "labels" in content:
        labels = _ids(content["labels"], "labels", None, vocab_size, refuse)[:max_length]
        if len(labels) != len(ids):
            refuse(f"labels must be as many as input_ids, {len(ids)}, got {len(labels)}")
    else:
        labels = [*ids[1:], IGNORED_LABEL]
    if not ids or all(label == IGNORED_LABEL for label in labels):
        refuse("has no position with a target")
    task = content.get("task")
    if task is not None and not isinstance(task, str):
        refuse(f"task={task!r}: must be a string")
    return DataRow(f"line-{number}", tuple(ids), tuple(labels), task)


def _ids(values: Any, name: str, lowest: int | None, vocab_size: int, refuse: Any) -> list[int]:
    if not isinstance(values, list):
        refuse(f"{name} must be a list of token ids")
    for value in values:
        is_ignored = lowest is None and value == IGNORED_LABEL
        if type(value) is not int or not (0 <= value < vocab_size or is_ignored):
            refuse(f"{name} holds {value!r}; ids lie in 0 to {vocab_size - 1}{'' if lowest == 0 else ', or are -100'}")
    return values


def rows_of_split(rows: Sequence[DataRow], split: str) -> list[DataRow]:
    """The rows that belong to ``split``.

    Raises:
        InvalidConfigError: there are none.
    """
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        raise InvalidConfigError(f"data: none of the {len(rows)} rows falls into the {split} split; give more rows")
    return chosen


def make_batch(rows: Sequence[DataRow], pad_id: int) -> RowBatch:
    """Put ``rows`` side by side."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    ids, targets = torch.full(shape, pad_id), torch.full(shape, IGNORED_LABEL)
    is_real = torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length] = torch.tensor(row.input_ids)
        targets[index, :length] = torch.tensor(row.targets)
        is_real[index, :length] = True
    return RowBatch(ids, is_real, targets, tuple(rows))
