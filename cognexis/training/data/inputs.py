"""From what a user names (files, folders, manifests, data sets) to sources with a domain and a weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError
from cognexis.tokens.guard import check_on_control
from cognexis.training.data.manifest import (
    DATA_MANIFEST,
    SHARD_FORMATS,
    TOKEN_FORMAT,
    check_weight,
    read_data_manifest,
)
from cognexis.training.data.sources import (
    LONGEST_RECORD,
    DocumentSource,
    JsonlSource,
    ParquetSource,
    Source,
    TableSource,
    require_file,
)
from cognexis.training.data.verify import require_sound

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
FORMATS = ("auto", "text", *(name for name in SHARD_FORMATS if name != TOKEN_FORMAT))


@dataclass(frozen=True)
class DataInput:
    """One input of a build.

    Attributes:
        source: a file, a folder, a manifest, a ``datasets.Dataset``, or a ``DocumentSource``.
        format: one of :data:`FORMATS`; ``auto`` goes by the name.
        domain: name of its kind of text.
        weight: rows read in an epoch for each row that is there.
        on_control: a control string in raw text makes a fault of the record (``raise``), or is letters (``text``).
    """

    source: Any
    format: str = "auto"
    domain: str = ""
    weight: float = 1.0
    on_control: str = "raise"


@dataclass(frozen=True)
class WeightedSource:
    """A source with what the manifest will say of its shards."""

    source: Source
    domain: str
    weight: float
    on_control: str


def open_inputs(inputs: Sequence[DataInput], longest: int = LONGEST_RECORD) -> list[WeightedSource]:
    """The sources of all inputs, each checked; nothing is written.

    Raises:
        InvalidConfigError: an input is missing, of no known kind, or cannot be read; the message names it.
    """
    if not inputs:
        raise InvalidConfigError("inputs: must name at least one file, folder or data set", path="inputs")
    found = [source for item in inputs for source in _open(item, longest)]
    for weighted in found:
        weighted.source.check()
    return found


def _open(item: DataInput, longest: int) -> list[WeightedSource]:
    def refuse_weight(rule: str) -> None:
        raise InvalidConfigError(f"weight={item.weight!r}: {rule}", path="weight", value=item.weight)

    check_weight(item.weight, refuse_weight)
    check_on_control(item.on_control)
    if item.format not in FORMATS:
        raise InvalidConfigError(
            f"format={item.format!r}: must be one of {', '.join(FORMATS)}{nearest_name(item.format, FORMATS)}",
            path="format",
            value=item.format,
        )
    if isinstance(item.source, DocumentSource):
        return [WeightedSource(item.source, item.domain, item.weight, item.on_control)]
    if hasattr(item.source, "column_names"):
        return [WeightedSource(TableSource(item.source, "dataset"), item.domain, item.weight, item.on_control)]
    path = Path(item.source)
    if path.name == DATA_MANIFEST or (path / DATA_MANIFEST).is_file():
        return _shards_of(path, longest, item.on_control)
    sources = _folder(path, item.format, longest) if path.is_dir() else [_file(path, item.format, longest)]
    return [WeightedSource(source, item.domain, item.weight, item.on_control) for source in sources]


def _shards_of(path: Path, longest: int, on_control: str) -> list[WeightedSource]:
    manifest = read_data_manifest(path)
    for index, shard in enumerate(manifest.shards):
        if shard.format == TOKEN_FORMAT:
            raise InvalidConfigError(f"{path}: shards[{index}] holds tokens already", path=f"shards[{index}].format")
    require_sound(manifest)
    return [
        WeightedSource(
            _file(manifest.folder / shard.path, shard.format, longest), shard.domain, shard.weight, on_control
        )
        for shard in manifest.shards
    ]


def _folder(path: Path, format: str, longest: int) -> list[Source]:
    if (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        return [TableSource(load_from_disk(str(path)), str(path), sorted(path.glob("*.arrow")))]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    known = [file for file in files if format != "auto" or format_of(file) is not None]
    texts = [file for file in known if (format_of(file) if format == "auto" else format) == "text"]
    found: list[Source] = [_file(file, format, longest) for file in known if file not in set(texts)]
    if texts:
        found.append(DocumentSource(str(path), [(file.relative_to(path).as_posix(), file) for file in texts]))
    if not found:
        raise InvalidConfigError(f"{path}: holds no file of a known format", path="inputs", value=str(path))
    return found


def _file(path: Path, format: str, longest: int) -> Source:
    require_file(path)
    found = format_of(path) if format == "auto" else format
    if found is None:
        raise InvalidConfigError(
            f"{path}: its name does not tell the format; give one of {', '.join(FORMATS[1:])}",
            path="format",
            value=str(path),
        )
    if found == "text":
        return DocumentSource(str(path.parent), [(path.name, path)])
    if found == "parquet":
        return ParquetSource(path)
    if found == "arrow":
        return TableSource(_arrow(path), str(path), [path])
    return JsonlSource(path, found, longest)


def format_of(path: Path) -> str | None:
    """The format that a file's name tells; None if it tells none."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl_text"
    if name.endswith(TEXT_SUFFIXES):
        return "text"
    return {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix.lower())


def _arrow(path: Path) -> Any:
    from datasets import Dataset
    from pyarrow import ArrowException  # type: ignore[import-untyped]

    try:
        return Dataset.from_file(str(path))
    except (ArrowException, OSError) as error:
        raise InvalidConfigError(f"{path}: no readable Arrow file: {error}", path=str(path)) from error
