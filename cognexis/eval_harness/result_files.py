"""Rows in a JSONL file that survives a kill.

A row is appended with one write of one line and forced to disk before the next begins. A line that was cut off by a
kill has no end of line; it is removed when the file is opened again, and its row is measured anew. A row whose
identity the file holds already is not written twice. One process at a time may have the file open.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from cognexis.checkpoints.json_file import parse_strict_json
from cognexis.errors import BackendError, InvalidConfigError
from cognexis.eval_harness.results import ResultRow, result_row


def row_line(row: ResultRow) -> bytes:
    """The line of a row: strict JSON, keys in the order of the fields."""
    return (json.dumps(row.model_dump(mode="json"), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def read_rows(path: Path) -> list[ResultRow]:
    """The complete rows of a file; a line without its end is left out.

    Raises:
        InvalidConfigError: a complete line is no row, or two rows are one measurement; names the line.
    """
    rows: dict[tuple[Any, ...], ResultRow] = {}
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):

        def refuse(reason: str, number: int = number) -> NoReturn:
            raise InvalidConfigError(f"{path}: line {number}: {reason}")

        content = parse_strict_json(line, refuse)
        if not isinstance(content, dict):
            refuse("must be an object")
        try:
            row = result_row(content)
        except InvalidConfigError as error:
            refuse(str(error))
        if row.identity in rows:
            refuse("measures the same as an earlier line")
        rows[row.identity] = row
    return list(rows.values())


def append_lines(path: Path, contents: Sequence[Any]) -> None:
    """Add the lines of strict JSON that are not there yet, forced to disk; what a kill cut off is removed first."""
    data = path.read_bytes() if path.is_file() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    known = set(data.split(b"\n")[:-1])
    lines = [json.dumps(content, ensure_ascii=False, allow_nan=False).encode() for content in contents]
    with open(path, "ab") as file:
        file.write(b"".join(line + b"\n" for line in lines if line not in known))
        file.flush()
        os.fsync(file.fileno())


class RowFile:
    """A result file that is open for appending.

        with RowFile(path) as file:
            if not file.has(identity):
                file.append(row)

    Raises:
        InvalidConfigError: the file holds something else than rows.
        BackendError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.rows = read_rows(path)
            whole = path.read_bytes().rfind(b"\n") + 1
            os.ftruncate(self._fd, whole)
        except BlockingIOError as error:
            os.close(self._fd)
            raise BackendError(f"{path}: another evaluation writes to this file") from error
        except BaseException:
            os.close(self._fd)
            raise
        self._known = {row.identity for row in self.rows}

    def has(self, identity: tuple[Any, ...]) -> bool:
        """Whether the file holds this measurement."""
        return identity in self._known

    def append(self, row: ResultRow) -> bool:
        """Write a row; False if the file holds the measurement already."""
        if row.identity in self._known:
            return False
        line = row_line(row)
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)
        self._known.add(row.identity)
        self.rows.append(row)
        return True

    def close(self) -> None:
        """Let others write."""
        os.close(self._fd)

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
