"""Rows of token shards by number: packed blocks, or one document a row.

Row r of a packed shard is the block of tokens r L .. (r + 1) L - 1 with L = ``sequence_length + 1``; blocks do not
reach from one shard into the next. Without packing a document has rows of its own, one for each L tokens of it. Rows
that would have nothing to learn (every target masked) are left out, so that no loss is 0 / 0.

A row costs two reads of mapped memory, and any row costs the same.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from cognexis.errors import InvalidConfigError, InvalidTokenIdError
from cognexis.training.data.packing import Packing, Row, make_row
from cognexis.training.data.token_shard import TokenShard

_SCANNED_BLOCKS = 4096


class TokenRows(Dataset[Row]):
    """The rows of one shard.

    Args:
        shard: where the tokens are.
        packing: length, padding and masks.
        packed: False gives each document rows of its own.
        vocab_size: ids lie below it; None means not checked.

    Raises:
        InvalidConfigError: the shard yields no row.
    """

    def __init__(
        self, shard: TokenShard, packing: Packing, *, packed: bool = True, vocab_size: int | None = None
    ) -> None:
        self.shard, self.packing, self.packed, self.vocab_size = shard, packing, packed, vocab_size
        self._row_ends = None if packed else self._rows_by_document()
        total = packing.num_blocks(shard.num_tokens) if packed else int(self._row_ends[-1])  # type: ignore[index]
        self._kept = self._with_targets(total) if shard.has_mask else None
        self._length = total if self._kept is None else len(self._kept)
        if not self._length:
            raise InvalidConfigError(f"{shard.path}: none of its {shard.num_documents} documents has a token to learn")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        """Tensors ``[L]``, or without packing as long as the piece of the document; see ``packing.py``."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index}: there are {self._length}")
        start, stop = self._range(int(self._kept[index]) if self._kept is not None else index)
        tokens = np.array(self.shard.tokens[start:stop])
        if self.vocab_size is not None and int(tokens.max()) >= self.vocab_size:
            place = int(np.argmax(tokens >= self.vocab_size))
            raise InvalidTokenIdError(
                f"{self.shard.path}: token {start + place} is id {int(tokens[place])}; ids lie in 0 to "
                f"{self.vocab_size - 1}",
                token_id=int(tokens[place]),
            )
        mask = self.shard.mask
        is_target = None if mask is None else np.array(mask[start:stop]).astype(bool)
        length = None if self.packed else stop - start
        return make_row(self.packing, tokens, self.shard.documents_of(start, stop), is_target, length)

    def _range(self, row: int) -> tuple[int, int]:
        """Which tokens a row holds, counted with the rows that have no target."""
        size = self.packing.block_length
        if self._row_ends is None:
            return row * size, min((row + 1) * size, self.shard.num_tokens)
        document = int(np.searchsorted(self._row_ends, row, side="right"))
        piece = row - (int(self._row_ends[document - 1]) if document else 0)
        start, stop = self.shard.document_range(document)
        return start + piece * size, min(start + (piece + 1) * size, stop)

    def _rows_by_document(self) -> NDArray[np.int64]:
        lengths = np.diff(np.asarray(self.shard.ends, np.int64), prepend=0)
        full, rest = np.divmod(lengths, self.packing.block_length)
        return np.cumsum(full + (rest > 1))

    def _with_targets(self, total: int) -> NDArray[np.int64]:
        """The rows in which at least one token is learned; the mask is read once, piece by piece."""
        kept = []
        for first in range(0, total, _SCANNED_BLOCKS):
            rows = range(first, min(total, first + _SCANNED_BLOCKS))
            kept += [row for row in rows if self._learns_something(*self._range(row))]
        return np.array(kept, np.int64)

    def _learns_something(self, start: int, stop: int) -> bool:
        assert self.shard.mask is not None
        learned = np.array(self.shard.mask[start + 1 : stop]).astype(bool)
        if self.packing.mask_boundary_targets:
            documents = self.shard.documents_of(start, stop)
            learned &= documents[1:] == documents[:-1]
        return bool(learned.any())


class JoinedRows(Dataset[Row]):
    """The rows of several datasets, one after another, with the domain that each belongs to.

    Args:
        parts: map-style datasets.
        domains: a name for each part.
        with_domain: add ``domain`` to every row, for those who weight or count by task.
    """

    def __init__(
        self, parts: Sequence[Dataset[Row]], domains: Sequence[str] | None = None, *, with_domain: bool = False
    ) -> None:
        self.parts = tuple(parts)
        self.domains = tuple(domains) if domains is not None else ("",) * len(self.parts)
        self.with_domain = with_domain
        self.counts = tuple(len(part) for part in self.parts)  # type: ignore[arg-type]
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.counts else 0

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index}: there are {len(self)}")
        part = self.part_of(index)
        row = self.parts[part][index - int(self._ends[part]) + self.counts[part]]
        return {**row, "domain": self.domains[part]} if self.with_domain else row  # type: ignore[dict-item]

    def part_of(self, index: int) -> int:
        """The part that a row belongs to."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def domain_of(self, index: int) -> str:
        """The domain that a row belongs to."""
        return self.domains[self.part_of(index)]
