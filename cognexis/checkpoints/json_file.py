"""JSON files that are read with suspicion and replaced in one step.

Reading: at most ``limit`` bytes, UTF-8, no key twice, no NaN or infinity, no deep nesting. Writing: under a temporary
name on the same file system, forced to disk, then put in place, so that a reader sees the old file or the new one.
"""

import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any

from cognexis.errors import CheckpointError

JSON_LIMIT = 64 * 2**20


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """Parse a file.

    Raises:
        CheckpointError: it is no regular file, too large, or no strict JSON; the message names it.
    """
    data = read_bytes(path, limit)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        CheckpointError: it cannot be read, is something else, or is larger.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if status.st_size > limit:
            raise CheckpointError(f"{path}: {status.st_size} bytes, at most {limit} are read")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def require_schema(path: Path, content: Any, version: int) -> None:
    """Refuse what is no object of the one known schema version.

    Raises:
        CheckpointError: names the version that was found.
    """
    found = content.get("schema_version") if isinstance(content, dict) else None
    if type(found) is not int or found != version:
        raise CheckpointError(f"{path}: schema_version={found!r}: must be {version}")


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` by ``content``, indented, keys in the given order."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step that survives a power failure."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return result


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")
