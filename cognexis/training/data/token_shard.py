"""Token shards: documents as one stream of token ids in a file that is mapped and never read whole.

    NAME.bin     the tokens, unsigned 32-bit little-endian, the end-of-document token behind each document
    NAME.ends    where each document ends in tokens, unsigned 64-bit little-endian, rising; the last is the token count
    NAME.mask    one byte a token, 1 where the token is to be learned; only where that is not every token

A bare ``NAME.bin`` of other tools can be read, too: its documents end behind each ``eod_token_id``.
"""

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cognexis.errors import InvalidConfigError

TOKEN_TYPE, END_TYPE, MASK_TYPE = np.dtype("<u4"), np.dtype("<u8"), np.dtype("u1")
SUFFIXES = (".bin", ".ends", ".mask")
_SCANNED_TOKENS = 2**20


class TokenShard:
    """One shard, mapped on first use; copies in other processes map it themselves.

    Args:
        path: the ``.bin`` file.
        eod_token_id: ends the documents of a file that has no ``.ends`` beside it.

    Attributes:
        num_tokens: length of the stream.
        num_documents: documents in it.

    Raises:
        InvalidConfigError: a file is missing or empty, its size is no multiple of the entry size, or the files of the
            shard contradict each other.
    """

    def __init__(self, path: str | Path, eod_token_id: int | None = None) -> None:
        self.path = Path(path)
        self.num_tokens = self._count(self.path, TOKEN_TYPE)
        self._maps: dict[str, Any] = {}
        self._found_ends: NDArray[np.int64] | None = None
        self.has_mask = self.path.with_suffix(".mask").exists()
        if self.has_mask and self._count(self.path.with_suffix(".mask"), MASK_TYPE) != self.num_tokens:
            self._refuse(self.path.with_suffix(".mask"), f"must have one byte for each of {self.num_tokens} tokens")
        ends = self.path.with_suffix(".ends")
        if ends.exists():
            self.num_documents = self._count(ends, END_TYPE)
            if int(self.ends[-1]) != self.num_tokens:
                self._refuse(ends, f"the last document ends at {int(self.ends[-1])}, the shard at {self.num_tokens}")
        elif eod_token_id is None:
            self._refuse(self.path, f"has no {ends.name} beside it; give eod_token_id to find where documents end")
        else:
            self._found_ends = self._find_ends(eod_token_id)
            self.num_documents = len(self._found_ends)

    @property
    def tokens(self) -> NDArray[np.uint32]:
        """All tokens ``[num_tokens]``, mapped."""
        return self._mapped(".bin", TOKEN_TYPE)

    @property
    def ends(self) -> NDArray[Any]:
        """Where each document ends ``[num_documents]``."""
        return self._found_ends if self._found_ends is not None else self._mapped(".ends", END_TYPE)

    @property
    def mask(self) -> NDArray[np.uint8] | None:
        """1 where a token is to be learned ``[num_tokens]``, mapped; None where that is every token."""
        return self._mapped(".mask", MASK_TYPE) if self.has_mask else None

    def document(self, index: int) -> NDArray[np.uint32]:
        """The tokens of a document, its end-of-document token included."""
        start, stop = self.document_range(index)
        return np.array(self.tokens[start:stop])

    def document_range(self, index: int) -> tuple[int, int]:
        """Where a document starts and ends in the stream."""
        if not 0 <= index < self.num_documents:
            raise InvalidConfigError(f"{self.path}: document {index}: there are {self.num_documents}")
        return int(self.ends[index - 1]) if index else 0, int(self.ends[index])

    def documents_of(self, start: int, stop: int) -> NDArray[np.int64]:
        """The document number of each token in ``start`` .. ``stop`` - 1."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop - 1, side="right"))
        edges = np.minimum(np.asarray(self.ends[first : last + 1], np.int64), stop)
        return np.repeat(np.arange(first, last + 1), np.diff(edges, prepend=start))

    def check_contents(self, vocab_size: int | None = None) -> None:
        """Read everything once, piece by piece.

        Raises:
            InvalidConfigError: document ends that do not rise, a mask byte other than 0 and 1, or an id that is not
                below ``vocab_size``; the message names the place.
        """
        previous = 0
        for start in range(0, self.num_documents, _SCANNED_TOKENS):
            ends = np.asarray(self.ends[start : start + _SCANNED_TOKENS], np.int64)
            wrong = np.flatnonzero(np.diff(ends, prepend=previous) <= 0)
            if wrong.size:
                self._refuse(self.path.with_suffix(".ends"), f"document {start + int(wrong[0])} holds no token")
            previous = int(ends[-1])
        for start in range(0, self.num_tokens, _SCANNED_TOKENS):
            stop = start + _SCANNED_TOKENS
            tokens = self.tokens[start:stop]
            if vocab_size is not None and int(tokens.max()) >= vocab_size:
                place = int(np.argmax(tokens >= vocab_size))
                self._refuse(
                    self.path,
                    f"token {start + place} is id {int(tokens[place])}; ids lie in 0 to {vocab_size - 1}",
                )
            if self.mask is not None and int(self.mask[start:stop].max()) > 1:
                self._refuse(self.path.with_suffix(".mask"), "must hold the bytes 0 and 1 only")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def _mapped(self, suffix: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        if suffix not in self._maps:
            self._maps[suffix] = np.memmap(self.path.with_suffix(suffix), dtype=dtype, mode="r")
        return self._maps[suffix]

    def _find_ends(self, eod_token_id: int) -> NDArray[np.int64]:
        pieces = []
        for start in range(0, self.num_tokens, _SCANNED_TOKENS):
            found = np.flatnonzero(self.tokens[start : start + _SCANNED_TOKENS] == eod_token_id)
            pieces.append(found + start + 1)
        ends = np.concatenate(pieces)
        return ends if ends.size and ends[-1] == self.num_tokens else np.append(ends, self.num_tokens)

    def _count(self, path: Path, dtype: np.dtype[Any]) -> int:
        if not path.is_file():
            self._refuse(path, "no such file")
        size = path.stat().st_size
        if size == 0:
            self._refuse(path, "is empty; a shard needs at least one document")
        if size % dtype.itemsize:
            self._refuse(path, f"{size} bytes are no multiple of {dtype.itemsize}; the file is cut off or damaged")
        return size // dtype.itemsize

    def _refuse(self, path: Path, reason: str) -> NoReturn:
        raise InvalidConfigError(f"{path}: {reason}", path=str(path), reason=reason)
