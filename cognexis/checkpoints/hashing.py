"""SHA-256 of files in the form ``sha256:<64 hex digits>``, several files at a time."""

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cognexis.errors import CheckpointError


def file_checksum(path: Path) -> str:
    """Hash one regular file.

    Raises:
        CheckpointError: it cannot be read, or is a folder, pipe or device.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def file_checksums(paths: Iterable[Path], num_threads: int | None = None) -> list[str]:
    """Hash files in parallel, one thread a core by default (hashing releases the interpreter lock)."""
    with ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(file_checksum, paths))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer would block for ever
