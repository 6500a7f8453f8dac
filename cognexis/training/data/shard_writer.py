"""Writes a token shard document by document; memory does not grow with the shard."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from cognexis.training.data.token_shard import END_TYPE, MASK_TYPE, SUFFIXES, TOKEN_TYPE


class TokenShardWriter:
    """Open files of one new shard; see ``token_shard.py`` for their form.

    Args:
        path: the ``.bin`` file; its companions stand beside it.
        with_mask: write which tokens are to be learned.
    """

    def __init__(self, path: Path, with_mask: bool = False) -> None:
        self.path = path
        self.num_tokens = 0
        self.num_documents = 0
        suffixes = SUFFIXES if with_mask else SUFFIXES[:2]
        with contextlib.ExitStack() as opened:
            self._files: dict[str, IO[bytes]] = {
                suffix: opened.enter_context(open(path.with_suffix(suffix), "wb")) for suffix in suffixes
            }
            opened.pop_all()

    def add(self, tokens: Sequence[int], is_target: Sequence[int] | None = None) -> None:
        """Append a document, its end-of-document token included."""
        self.num_tokens += len(tokens)
        self.num_documents += 1
        self._files[".bin"].write(np.asarray(tokens, TOKEN_TYPE).tobytes())
        self._files[".ends"].write(np.asarray([self.num_tokens], END_TYPE).tobytes())
        if ".mask" in self._files:
            targets = np.ones(len(tokens), MASK_TYPE) if is_target is None else np.asarray(is_target, MASK_TYPE)
            self._files[".mask"].write(targets.tobytes())

    def close(self) -> list[Path]:
        """Force everything to disk; the paths of the files."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return [self.path.with_suffix(suffix) for suffix in self._files]

    def discard(self) -> None:
        """Remove the files."""
        for suffix, file in self._files.items():
            with contextlib.suppress(OSError):
                file.close()
            self.path.with_suffix(suffix).unlink(missing_ok=True)
