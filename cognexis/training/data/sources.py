"""Where records come from: one class for each kind of file, all read piece by piece and from any position.

A record is a dictionary, whatever it is read from. ``position`` says where to go on: a byte of a JSONL file, a row of
the others. Reading from the position of a record gives that record and everything after it.
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from cognexis.checkpoints.json_file import parse_strict_json
from cognexis.errors import InvalidConfigError
from cognexis.training.data.corruption import Place, RecordFault

LONGEST_RECORD = 16 * 2**20
_ROWS_AT_ONCE = 256
CONTENT_FIELDS = ("text", "input_ids", "token_ids", "messages")


@dataclass(frozen=True)
class RawRecord:
    """A record before anything was made of it.

    Attributes:
        content: what was read, or the fault that was met.
        place: where it stands.
        next_position: where the record after it begins.
    """

    content: dict[str, Any] | RecordFault
    place: Place
    next_position: int


class Source(Protocol):
    """Something with records."""

    name: str
    format: str

    def check(self) -> None:
        """Raise InvalidConfigError if this cannot be read at all; cheap."""

    def identity(self) -> list[Any]:
        """What tells whether this is still the same source, as JSON."""

    def read(self, position: int = 0) -> Iterator[RawRecord]:
        """Records from ``position`` on."""


class JsonlSource:
    """JSON lines, also compressed with gzip; blank lines are no records.

    Args:
        path: the file; a name ending in ``.gz`` is compressed, and positions count uncompressed bytes.
        longest: bytes of the longest line that is read; longer ones are faults and never held in memory.
    """

    def __init__(self, path: Path, format: str = "jsonl_text", longest: int = LONGEST_RECORD) -> None:
        self.path, self.name, self.format, self.longest = path, str(path), format, longest
        self._known: tuple[int, int] = (0, 1)

    def check(self) -> None:
        """Raise InvalidConfigError if there is no such file or it is no gzip file."""
        require_file(self.path)
        try:
            with self._open() as file:
                file.read(1)
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidConfigError(f"{self.path}: cannot be read: {error}", path=self.name) from error

    def identity(self) -> list[Any]:
        """Name, size and time of change."""
        return file_identity(self.path)

    def read(self, position: int = 0, first_number: int | None = None) -> Iterator[RawRecord]:
        """Records from the byte ``position`` on; without ``first_number`` the lines before it are counted."""
        with self._open() as file:
            number = self._skip(file, position) if first_number is None else first_number
            if first_number is not None:
                file.seek(position)
            while True:
                try:
                    line, size = self._next_line(file)
                except (EOFError, OSError, zlib.error) as error:
                    yield RawRecord(RecordFault("cut_off", str(error)), self._place(number, position), position)
                    return
                if not size:
                    return
                start, position = position, position + size
                if line is None:
                    fault = RecordFault("too_long", f"more than {self.longest} bytes")
                    yield RawRecord(fault, self._place(number, start), position)
                else:
                    if start == 0:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.strip():
                        yield RawRecord(_parsed(line), self._place(number, start), position)
                number += 1

    def _skip(self, file: Any, position: int) -> int:
        """Go to ``position``; the number of the line there."""
        number, left = 1, position
        while left > 0 and (piece := file.read(min(left, 2**20))):
            number += piece.count(b"\n")
            left -= len(piece)
        return number

    def _place(self, number: int, offset: int) -> Place:
        return Place(self.name, number, offset)

    def _next_line(self, file: Any) -> tuple[bytes | None, int]:
        """A line, or None for one that is too long, and its size; size 0 at the end."""
        line = file.readline(self.longest + 2)
        if len(line) <= self.longest + 1:
            return line, len(line)
        size = len(line)
        while not line.endswith(b"\n") and (line := file.readline(2**20)):
            size += len(line)
        return None, size

    def _open(self) -> Any:
        return gzip.open(self.path, "rb") if self.path.suffix == ".gz" else open(self.path, "rb")


class TableSource:
    """Rows of a ``datasets.Dataset``: an Arrow file, a folder of ``save_to_disk``, or one that a caller made.

    Args:
        dataset: the rows, mapped from disk as ``datasets`` does.
        name: for messages.
    """

    format = "arrow"

    def __init__(self, dataset: Any, name: str, files: Sequence[Path] = ()) -> None:
        self.dataset, self.name, self.files = dataset, name, tuple(files)

    def check(self) -> None:
        """Raise InvalidConfigError if no column holds text, token ids or messages."""
        require_columns(self.name, self.dataset.column_names)

    def identity(self) -> list[Any]:
        """Name, fingerprint and size."""
        files = [file_identity(path) for path in self.files]
        return [self.name, files or self.dataset._fingerprint, len(self.dataset)]

    def read(self, position: int = 0) -> Iterator[RawRecord]:
        """Records from the row ``position`` on."""
        columns = [name for name in self.dataset.column_names if name in _READ_COLUMNS]
        rows = self.dataset.select_columns(columns)
        for start in range(position, len(rows), _ROWS_AT_ONCE):
            batch = rows[start : start + _ROWS_AT_ONCE]
            for index in range(len(batch[columns[0]])):
                content = {name: batch[name][index] for name in columns if batch[name][index] is not None}
                number = start + index + 1
                yield RawRecord(content, Place(self.name, number), number)


class ParquetSource:
    """Rows of a Parquet file, a few hundred at a time."""

    format = "parquet"

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def check(self) -> None:
        """Raise InvalidConfigError if this is no Parquet file, or no column holds text, token ids or messages."""
        require_file(self.path)
        require_columns(self.name, self._file().schema_arrow.names)

    def identity(self) -> list[Any]:
        """Name, size and time of change."""
        return file_identity(self.path)

    def read(self, position: int = 0) -> Iterator[RawRecord]:
        """Records from the row ``position`` on; row groups before it are not read."""
        file = self._file()
        columns = [name for name in file.schema_arrow.names if name in _READ_COLUMNS]
        first = 0
        groups: list[int] = []
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if groups or first + size > position:
                groups.append(group)
            else:
                first += size
        number = first
        try:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns) if groups else ():
                for row in batch.to_pylist():
                    number += 1
                    if number > position:
                        content = {name: value for name, value in row.items() if value is not None}
                        yield RawRecord(content, Place(self.name, number), number)
        except OSError as error:  # what pyarrow raises for damaged pages
            yield RawRecord(RecordFault("cut_off", str(error)), Place(self.name, number + 1), number)

    def _file(self) -> Any:
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

        try:
            return ParquetFile(self.path)
        except (ArrowException, OSError) as error:
            raise InvalidConfigError(f"{self.path}: no readable Parquet file: {error}", path=self.name) from error


class DocumentSource:
    """Whole texts, each one document: text files, or what another part of the program has in memory.

    Args:
        name: of the collection.
        texts: the documents' names and their texts or files.
        identity: what tells whether these are still the same documents.
    """

    format = "text"

    def __init__(self, name: str, texts: Sequence[tuple[str, str | Path]], identity: Sequence[Any] = ()) -> None:
        self.name, self.texts, self._identity = name, texts, list(identity)

    def check(self) -> None:
        """Raise InvalidConfigError if a file is missing."""
        for _, text in self.texts:
            if isinstance(text, Path):
                require_file(text)

    def identity(self) -> list[Any]:
        """The given identity, or name, size and time of change of each file."""
        files = [file_identity(text) for _, text in self.texts if isinstance(text, Path)]
        return [self.name, *self._identity, *files]

    def read(self, position: int = 0) -> Iterator[RawRecord]:
        """Documents from number ``position`` on."""
        for index in range(position, len(self.texts)):
            name, text = self.texts[index]
            content: dict[str, Any] | RecordFault
            try:
                content = {"text": text if isinstance(text, str) else _read_text(text)}
            except RecordFault as fault:
                content = fault
            yield RawRecord(content, Place(f"{self.name}: {name}", index + 1), index + 1)


_READ_COLUMNS = (*CONTENT_FIELDS, "loss_mask", "system", "metadata", "tools")


def require_file(path: Path) -> None:
    """Raise InvalidConfigError unless ``path`` is a file that can be opened."""
    if not path.is_file():
        raise InvalidConfigError(f"{path}: no such file", path="inputs", value=str(path))
    try:
        path.open("rb").close()
    except OSError as error:
        raise InvalidConfigError(
            f"{path}: cannot be read: {error.strerror}", path="inputs", value=str(path)
        ) from error


def require_columns(name: str, columns: Sequence[str]) -> None:
    """Raise InvalidConfigError unless exactly one column holds documents."""
    found = [column for column in columns if column in CONTENT_FIELDS]
    if len(found) != 1:
        raise InvalidConfigError(
            f"{name}: needs exactly one of the columns {', '.join(CONTENT_FIELDS)}; has {', '.join(columns) or 'no'}",
            path="inputs",
            value=name,
        )


def file_identity(path: Path) -> list[Any]:
    """Name, size in bytes and time of change in nanoseconds."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _parsed(line: bytes) -> dict[str, Any] | RecordFault:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RecordFault("not_utf8", f"{error.reason} at byte {error.start} of the line")

    def refuse(reason: str) -> NoReturn:
        raise RecordFault("invalid_json", reason)

    try:
        content = parse_strict_json(line, refuse)
    except RecordFault as fault:
        return fault
    return content if isinstance(content, dict) else RecordFault("not_an_object", f"got {type(content).__name__}")


def _read_text(path: Path) -> str:
    if path.stat().st_size > LONGEST_RECORD:
        raise RecordFault("too_long", f"more than {LONGEST_RECORD} bytes")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="").read()
    except UnicodeDecodeError as error:
        raise RecordFault("not_utf8", f"{error.reason} at byte {error.start}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RecordFault("cut_off", str(error)) from None
