"""Writes a token shard document by document; memory does not grow with the shard."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from cognexis.training.data.token_shard import END_TYPE, MASK_TYPE, TOKEN_TYPE

_PIECE = 2**20


class TokenShardWriter:
    """Open files of one new shard; see ``token_shard.py`` for their form.

    The mask appears with the first document of which not every token is learned.

    Args:
        path: the ``.bin`` file; its companions stand beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_tokens = 0
        self.num_documents = 0
        self._opened = contextlib.ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        for suffix in (".bin", ".ends"):
            self._open(suffix)

    def add(self, tokens: NDArray[np.uint32], is_target: Sequence[int] | None = None) -> None:
        """Append a document, its end-of-document token included."""
        if is_target is not None and ".mask" not in self._files:
            self._open(".mask")
            for start in range(0, self.num_tokens, _PIECE):
                self._files[".mask"].write(b"\1" * min(_PIECE, self.num_tokens - start))
        if ".mask" in self._files:
            targets = np.ones(len(tokens), MASK_TYPE) if is_target is None else np.asarray(is_target, MASK_TYPE)
            self._files[".mask"].write(targets.tobytes())
        self.num_tokens += len(tokens)
        self.num_documents += 1
        self._files[".bin"].write(tokens.astype(TOKEN_TYPE).tobytes())
        self._files[".ends"].write(np.asarray([self.num_tokens], END_TYPE).tobytes())

    def close(self) -> list[Path]:
        """Force everything to disk; the paths of the files."""
        with self._opened:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        return [self.path.with_suffix(suffix) for suffix in self._files]

    def discard(self) -> None:
        """Remove the files."""
        with contextlib.suppress(OSError):
            self._opened.close()
        for suffix in self._files:
            self.path.with_suffix(suffix).unlink(missing_ok=True)

    def _open(self, suffix: str) -> None:
        self._files[suffix] = self._opened.enter_context(self.path.with_suffix(suffix).open("wb"))
