"""Rows of equal length made of documents: the arithmetic of packing.

Each document is followed by an end-of-document token, all documents form one stream of tokens, and the stream is cut
into blocks of ``sequence_length + 1`` tokens. A document may begin in one block and go on in the next. The last block
is filled up with padding, known by its place and never by the padding id, which may also occur inside a document.

For a block x_0 .. x_n with document numbers d_i a row holds

    input_ids        x_i, padding id behind the last real token
    labels           x_i where the prediction of x_i from x_{i-1} is learned, else -100
    attention_mask   1 for real tokens, 0 for padding
    document_ids     d_i, -1 for padding
    position_ids     i minus the place where d_i begins in the block; with ``position_reset="continue"`` i itself

The labels are not shifted, as transformers wants them. Not learned are: x_0 (nothing in the block predicts it),
padding, the first token of a document (its predecessor belongs to another one, unless ``mask_boundary_targets`` is
False), and what a target mask leaves out. ``shifted_view`` gives the same row as inputs and targets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cognexis.errors import InvalidConfigError

IGNORED_LABEL = -100
POSITION_RESETS = ("reset", "continue")

Row = dict[str, Tensor]


@dataclass(frozen=True)
class Packing:
    """How blocks are made.

    Attributes:
        sequence_length: predicted tokens of a block, 1 or more; a block holds one token more.
        pad_token_id: fills the last block.
        position_reset: ``reset`` counts positions from the start of a document, ``continue`` from that of the block.
        mask_boundary_targets: do not learn the first token of a document from the last one of another.
    """

    sequence_length: int
    pad_token_id: int
    position_reset: str = "reset"
    mask_boundary_targets: bool = True

    def __post_init__(self) -> None:
        rules = {
            "sequence_length": (_is_count(self.sequence_length, 1), "must be a whole number of 1 or more"),
            "pad_token_id": (_is_count(self.pad_token_id, 0), "must be a token id, 0 or more"),
            "position_reset": (
                self.position_reset in POSITION_RESETS,
                f"must be one of {', '.join(POSITION_RESETS)}",
            ),
        }
        for name, (is_valid, rule) in rules.items():
            if not is_valid:
                value = getattr(self, name)
                raise InvalidConfigError(f"{name}={value!r}: {rule}", path=name, value=value)

    @property
    def block_length(self) -> int:
        """Tokens of a block."""
        return self.sequence_length + 1

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of a stream; a last block of one token has nothing to predict and is left out."""
        full, rest = divmod(num_tokens, self.block_length)
        return full + (rest > 1)


def make_row(
    packing: Packing,
    tokens: NDArray[Any],
    documents: NDArray[np.int64],
    is_target: NDArray[np.bool_] | None = None,
    length: int | None = None,
) -> Row:
    """One row from the tokens of a block.

    Args:
        tokens: ``[n]`` ids, n at most ``length``.
        documents: ``[n]``, the document of each token, 0 or more, rising.
        is_target: ``[n]``, False where a token is not to be learned; None means everywhere True.
        length: tokens of the row; None means those of a block.

    Returns:
        Tensors ``[length]`` of int64; see the module docstring.
    """
    count, length = len(tokens), packing.block_length if length is None else length
    starts = np.ones(count, dtype=bool)
    starts[1:] = documents[1:] != documents[:-1]
    learned = ~starts if packing.mask_boundary_targets else np.arange(count) > 0
    if is_target is not None:
        learned = learned & is_target
    ids = np.full(length, packing.pad_token_id, np.int64)
    labels = np.full(length, IGNORED_LABEL, np.int64)
    document_ids = np.full(length, -1, np.int64)
    positions = np.arange(length)
    ids[:count] = tokens
    labels[:count] = np.where(learned, ids[:count], IGNORED_LABEL)
    document_ids[:count] = documents
    if packing.position_reset == "reset":
        positions[:count] -= np.maximum.accumulate(np.where(starts, positions[:count], 0))
        positions[count:] -= count
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy((document_ids >= 0).astype(np.int64)),
        "position_ids": torch.from_numpy(positions),
        "document_ids": torch.from_numpy(document_ids),
    }


def pack_documents(documents: Iterable[Sequence[int]], packing: Packing, eod_token_id: int) -> list[Row]:
    """Pack documents that are in memory; empty ones are left out.

    Args:
        documents: token ids without an end-of-document token.
        packing: how blocks are made.
        eod_token_id: put behind each document.
    """
    kept = [[*document, eod_token_id] for document in documents if len(document)]
    tokens = np.array([token for document in kept for token in document], np.int64)
    numbers = np.repeat(np.arange(len(kept)), [len(document) for document in kept])
    cuts = range(0, packing.num_blocks(len(tokens)) * packing.block_length, packing.block_length)
    return [make_row(packing, tokens[a : a + cuts.step], numbers[a : a + cuts.step]) for a in cuts]


def shifted_view(row: Row) -> Row:
    """Inputs and targets of a row or batch, shifted: ``[..., T + 1]`` becomes ``[..., T]``.

    Returns:
        ``input_ids``, ``target_ids``, ``loss_mask`` (float), and the others without their last place.
    """
    view = {name: value[..., :-1] for name, value in row.items() if name != "labels"}
    return view | {
        "target_ids": row["input_ids"][..., 1:],
        "loss_mask": (row["labels"][..., 1:] != IGNORED_LABEL).float(),
    }


def _is_count(value: Any, lowest: int) -> bool:
    return type(value) is int and lowest <= value < 2**31
