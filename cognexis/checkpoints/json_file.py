"""JSON files that are read with suspicion and replaced in one step.

Reading: at most ``limit`` bytes, UTF-8, no key twice, no NaN or infinity, no deep nesting. Writing: under a temporary
name on the same file system, forced to disk, then put in place, so that a reader sees the old file or the new one.
"""

import json
import math
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cognexis.errors import CheckpointError, CognexisError

JSON_LIMIT = 64 * 2**20
MAX_DEPTH = 64


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """Parse a file.

    Raises:
        CheckpointError: it is no regular file, too large, or no strict JSON; the message names it.
    """

    def refuse(reason: str) -> NoReturn:
        raise CheckpointError(f"{path}: {reason}")

    return parse_strict_json(read_bytes(path, limit), refuse)


def parse_strict_json(data: bytes, refuse: Callable[[str], NoReturn]) -> Any:
    """Parse JSON that nobody vouches for.

    Args:
        refuse: raises the caller's error for a reason: not UTF-8, malformed, nested more than ``MAX_DEPTH`` deep, a
            key given twice, a number that is not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(pairs)) < len(pairs):
            names = [key for key, _ in pairs]
            refuse(f"the key {next(k for k in names if names.count(k) > 1)!r} is given twice")
        return result

    def finite(text: str) -> float:
        return value if math.isfinite(value := float(text)) else refuse(f"the number {text[:40]} is not finite")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except CognexisError:
        raise
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8: {error.reason} at byte {error.start}")
    except RecursionError:
        refuse(f"nested more than {MAX_DEPTH} deep")
    except ValueError as error:  # malformed, or an integer of thousands of digits
        refuse(f"not valid JSON: {error}")
    layer: list[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        layer = [x for y in layer for x in (y.values() if isinstance(y, dict) else y) if isinstance(x, (dict, list))]
    if layer:
        refuse(f"nested more than {MAX_DEPTH} deep")
    return value


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
