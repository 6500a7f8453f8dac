"""``data_manifest.json``: the shards of a data set, with their checksums, and where the text came from.

    {"schema_version": 1,
     "shards": [{"path", "format", "num_documents", "num_tokens", "sha256", "weight", "domain", "companions"}, ...],
     "tokenizer": {...}, "settings": {...}, "counts": {...}, "sources": [...],
     "sha256": "sha256:<64 hex digits>"}

``shards`` is the only necessary key. ``path`` is relative to the folder of the manifest and stays inside of it;
``companions`` maps the suffixes of further files of a shard to their checksums. ``weight`` is how often a row of the
shard is read in an epoch on average. The last key is the SHA-256 of all others in canonical form: keys sorted, no
blanks, UTF-8. The name ``checksum`` is read in place of ``sha256``.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from cognexis.checkpoints.json_file import JSON_LIMIT, parse_strict_json, read_bytes, write_json
from cognexis.configuration_rules import nearest_name
from cognexis.errors import ArtifactMismatchError, CheckpointError, InvalidConfigError

DATA_MANIFEST = "data_manifest.json"
MANIFEST_VERSION = 1
TOKEN_FORMAT = "token_ids_u32"
SHARD_FORMATS = ("jsonl_text", "jsonl_token_ids", "jsonl_chat", TOKEN_FORMAT, "parquet", "arrow")
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}")
_RECORDS = ("tokenizer", "settings", "counts", "sources")
_KEYS = ("schema_version", "shards", *_RECORDS, "sha256")


@dataclass(frozen=True)
class ShardEntry:
    """One shard.

    Attributes:
        path: the file, relative to the manifest's folder, with forward slashes.
        format: one of :data:`SHARD_FORMATS`.
        num_documents: documents in it.
        num_tokens: tokens in it, end-of-document tokens included; None where it holds no tokens yet.
        sha256: ``sha256:...`` of the file.
        weight: rows read in an epoch for each row that is there, above 0.
        domain: name of its kind of text.
        companions: suffix -> ``sha256:...`` of the files beside it that belong to it.
    """

    path: str
    format: str
    num_documents: int
    num_tokens: int | None
    sha256: str
    weight: float = 1.0
    domain: str = ""
    companions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataManifest:
    """The shards of a data set.

    Attributes:
        shards: at least one.
        folder: what the paths are relative to.
        tokenizer: what is recorded of the tokenizer: ``checksum``, ``vocab_size``, ``eod_token_id``, ``pad_token_id``.
        settings: how the shards were made.
        counts: records that were read, left out and why.
        sources: packages, versions, licences and checksums of the text.
    """

    shards: tuple[ShardEntry, ...]
    folder: Path
    tokenizer: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    counts: dict[str, Any] | None = None
    sources: list[dict[str, Any]] | None = None

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.num_tokens or 0 for shard in self.shards)

    @property
    def checksum(self) -> str:
        """``sha256:...`` of the content; goes into training logs and checkpoints."""
        return canonical_checksum(self.content())

    def content(self) -> dict[str, Any]:
        """The keys of the file except the checksum."""
        records = {name: getattr(self, name) for name in _RECORDS}
        return {
            "schema_version": MANIFEST_VERSION,
            "shards": [asdict(shard) for shard in self.shards],
            **{name: value for name, value in records.items() if value is not None},
        }

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        write_json(path, self.content() | {"sha256": self.checksum})


def canonical_checksum(content: dict[str, Any]) -> str:
    """``sha256:...`` of JSON with sorted keys and no blanks."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def read_data_manifest(path: str | Path) -> DataManifest:
    """Parse a manifest; the shards themselves are not opened.

    Args:
        path: the file, or its folder.

    Raises:
        InvalidConfigError: no such file, or a key or value that breaks a rule; the message names it.
        ArtifactMismatchError: the content is not what its checksum was made of.
    """
    path = Path(path)
    path = path / DATA_MANIFEST if path.is_dir() else path

    def refuse(reason: str) -> NoReturn:
        raise InvalidConfigError(f"{path}: {reason}", path=str(path), reason=reason)

    try:
        content = parse_strict_json(read_bytes(path, JSON_LIMIT), refuse)
    except CheckpointError as error:
        raise InvalidConfigError(str(error), path=str(path)) from error
    if not isinstance(content, dict):
        refuse("must be one object")
    recorded = content.pop("sha256", None) or content.pop("checksum", None)
    for key in content:
        if key not in _KEYS:
            refuse(f"unknown key {key!r}{nearest_name(key, _KEYS)}")
    if content.get("schema_version") != MANIFEST_VERSION or type(content["schema_version"]) is not int:
        refuse(f"schema_version={content.get('schema_version')!r}: must be {MANIFEST_VERSION}")
    if not isinstance(content.get("shards"), list) or not content["shards"]:
        refuse("shards: must be a list with at least one entry")
    if not isinstance(recorded, str) or not _CHECKSUM.fullmatch(recorded):
        refuse(f"sha256={recorded!r}: must be sha256: and 64 hexadecimal digits")
    if (actual := canonical_checksum(content)) != recorded:
        raise ArtifactMismatchError(
            f"{path}: the content has checksum {actual}, the file says {recorded}; it was changed or damaged",
            path="sha256",
            value=recorded,
        )
    shards = tuple(_shard(path, index, entry) for index, entry in enumerate(content["shards"]))
    check_shards(shards, refuse)
    records = {name: content.get(name) for name in _RECORDS}
    for name, value in records.items():
        if value is not None and not isinstance(value, list if name == "sources" else dict):
            refuse(f"{name}: must be {'a list' if name == 'sources' else 'an object'}")
    return DataManifest(shards, path.parent, **records)


def check_shards(shards: Sequence[ShardEntry], refuse: Any) -> None:
    """Refuse a path that stands twice."""
    paths = [PurePosixPath(shard.path) for shard in shards]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []:
        refuse(f"shards: {twice[0]!r} stands {paths.count(PurePosixPath(twice[0]))} times")


def _shard(path: Path, index: int, entry: Any) -> ShardEntry:
    where = f"{path}: shards[{index}]"

    def refuse(name: str, rule: str) -> NoReturn:
        value = entry.get(name) if isinstance(entry, dict) else entry
        raise InvalidConfigError(f"{where}.{name}={value!r}: {rule}", path=f"shards[{index}].{name}", value=value)

    if not isinstance(entry, dict):
        raise InvalidConfigError(f"{where}: must be an object, got {type(entry).__name__}", path=f"shards[{index}]")
    entry = dict(entry)
    if "checksum" in entry and "sha256" not in entry:
        entry["sha256"] = entry.pop("checksum")
    known = ShardEntry.__dataclass_fields__
    for key in entry:
        if key not in known:
            raise InvalidConfigError(
                f"{where}: unknown key {key!r}{nearest_name(key, known)}", path=f"shards[{index}]"
            )
    for key in ("path", "format", "num_documents", "num_tokens", "sha256"):
        if key not in entry:
            refuse(key, "is missing")
    if not is_inner_path(entry["path"]):
        refuse("path", "must be a relative path inside the manifest's folder, without '..'")
    if entry["format"] not in SHARD_FORMATS:
        refuse("format", f"must be one of {', '.join(SHARD_FORMATS)}")
    for key in ("num_documents", "num_tokens"):
        lowest = 1 if entry["format"] == TOKEN_FORMAT else 0
        may_lack = key == "num_tokens" and entry["format"] != TOKEN_FORMAT and entry[key] is None
        if not may_lack and (type(entry[key]) is not int or entry[key] < lowest):
            refuse(key, f"must be a whole number of {lowest} or more")
    if not isinstance(entry["sha256"], str) or not _CHECKSUM.fullmatch(entry["sha256"]):
        refuse("sha256", "must be sha256: and 64 hexadecimal digits")
    check_weight(entry.get("weight", 1.0), lambda rule: refuse("weight", rule))
    if not isinstance(entry.get("domain", ""), str):
        refuse("domain", "must be a string")
    companions = entry.get("companions", {})
    if not isinstance(companions, dict) or not all(
        re.fullmatch(r"\.[a-z]{1,8}", suffix) and isinstance(value, str) and _CHECKSUM.fullmatch(value)
        for suffix, value in companions.items()
    ):
        refuse("companions", "must map suffixes such as .ends to checksums")
    return ShardEntry(**{**entry, "weight": float(entry.get("weight", 1.0))})


def check_weight(weight: Any, refuse: Any) -> None:
    """Refuse a weight that is no finite number above 0."""
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or not 0 < weight <= 2**20:
        refuse("must be a finite number above 0, at most 2^20")


def is_inner_path(path: Any) -> bool:
    """Whether ``path`` names a file below the folder that it is relative to."""
    if not isinstance(path, str) or not path or "\0" in path or "\\" in path:
        return False
    parts = PurePosixPath(path).parts
    return not PurePosixPath(path).is_absolute() and ".." not in parts and bool(parts) and ":" not in parts[0]
