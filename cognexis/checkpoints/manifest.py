"""``manifest.json``: the files of a checkpoint with their sizes and SHA-256 checksums.

    {"schema_version": 1, "artifacts": [{"path", "kind", "required", "bytes", "sha256"}, ...]}

A required file must be there and match. An optional one may be absent or edited by hand (generation defaults, the
remote code): a difference is reported and nothing more. Files that the manifest does not name are nobody's business;
a checkpoint may carry a README or an optimizer state beside it.
"""

import fnmatch
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cognexis.checkpoints.hashing import file_checksums
from cognexis.checkpoints.json_file import read_json, require_schema, write_json
from cognexis.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}")

# Pattern of a file name -> kind, and whether loading depends on it. The first match counts.
_KINDS = (
    ("model*.safetensors", "model_weights", True),
    ("model*.safetensors.index*.json", "model_weights", True),
    ("config.json", "config", True),
    ("metadata.json", "metadata", True),
    ("tokenizer.json", "tokenizer_model", True),
    ("tokenizer_manifest.json", "tokenizer_manifest", True),
    ("tokenizer_config.json", "tokenizer_config", True),
    ("chat_template.jinja", "chat_template", True),
    ("scheduler.json", "scheduler_state", False),
    ("config.resolved.yaml", "resolved_config", False),
    ("generation_config.json", "generation_config", False),
    ("*_cognexis.py", "code", False),
    # What only training needs; a model loads without it, and resuming demands it.
    ("optimizer.pt", "optimizer_state", False),
    ("scheduler.pt", "learning_rate_state", False),
    ("scaler.pt", "scaler_state", False),
    ("rng_state*.pth", "rng_state", False),
    ("curriculum.json", "curriculum_state", False),
    ("data_loader.json", "data_loader_state", False),
    ("trainer_state.json", "trainer_state", False),
    ("training_state.json", "trainer_state", False),
)
KINDS = tuple(dict.fromkeys(kind for _, kind, _ in _KINDS))


@dataclass(frozen=True)
class Artifact:
    """One file of a checkpoint: its name in the folder, what it is, its size in bytes and its checksum."""

    path: str
    kind: str
    required: bool
    bytes: int
    sha256: str


@dataclass(frozen=True)
class VerificationResult:
    """What was found when a folder was compared with its manifest.

    Attributes:
        is_present: False where there is no manifest; then nothing was compared.
        num_files: number of files that were hashed.
        faults: differences in required files.
        notes: differences in optional files.
        artifacts: what the manifest names.
    """

    is_present: bool
    num_files: int = 0
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    artifacts: tuple[Artifact, ...] = ()


def kind_of(name: str) -> tuple[str, bool] | None:
    """The kind of a file by its name, and whether it is required; None for a file that does not count."""
    return next(((kind, required) for pattern, kind, required in _KINDS if fnmatch.fnmatchcase(name, pattern)), None)


def write_manifest(folder: Path, sources: dict[str, Path] | None = None) -> None:
    """Hash the files of a checkpoint and write ``manifest.json`` into ``folder``.

    Args:
        sources: file name -> where its content lies now; None takes the files in ``folder``.
    """
    if sources is None:
        sources = {path.name: path for path in folder.iterdir() if path.is_file()}
    named = {name: path for name, path in sorted(sources.items()) if kind_of(name)}
    content = {"schema_version": MANIFEST_VERSION, "artifacts": [asdict(artifact) for artifact in _hashed(named)]}
    write_json(folder / MANIFEST_FILE, content)


def refresh_manifest(staging: Path, folder: Path) -> None:
    """Write into ``staging`` the manifest that ``folder`` will need when the files in ``staging`` have joined it.

    Files that ``staging`` does not hold keep the entry that they have, checked or not. Where ``folder`` has no
    manifest, or one that cannot be read and so says nothing that could be kept, none is written.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return
    new = {path.name: path for path in staging.iterdir() if path.is_file() and kind_of(path.name)}
    try:
        artifacts = [artifact for artifact in read_manifest(folder) if artifact.path not in new]
    except CheckpointError:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        return
    artifacts += _hashed(new)
    content = [asdict(artifact) for artifact in sorted(artifacts, key=lambda artifact: artifact.path)]
    write_json(staging / MANIFEST_FILE, {"schema_version": MANIFEST_VERSION, "artifacts": content})


def _hashed(paths: dict[str, Path]) -> list[Artifact]:
    artifacts = []
    for (name, path), checksum in zip(paths.items(), file_checksums(paths.values()), strict=True):
        kind, required = kind_of(name) or ("", False)
        artifacts.append(Artifact(name, kind, required, path.stat().st_size, checksum))
    return artifacts


def read_manifest(folder: Path) -> list[Artifact]:
    """Parse ``manifest.json``.

    Raises:
        CheckpointError: it is damaged, of another schema version, or names a file outside the folder.
    """
    path = folder / MANIFEST_FILE
    content = read_json(path)
    require_schema(path, content, MANIFEST_VERSION)
    entries = content.get("artifacts")
    if not isinstance(entries, list) or not entries:
        raise CheckpointError(f"{path}: artifacts must be a list with at least one entry")
    artifacts = [_artifact(path, index, entry) for index, entry in enumerate(entries)]
    names = [artifact.path for artifact in artifacts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise CheckpointError(f"{path}: {sorted(twice)} stand twice")
    if missing := {"config", "metadata"} - {artifact.kind for artifact in artifacts}:
        raise CheckpointError(f"{path}: no artifact of kind {sorted(missing)}")
    return artifacts


def _artifact(path: Path, index: int, entry: Any) -> Artifact:
    where = f"{path}: artifacts[{index}]"
    if not isinstance(entry, dict) or set(entry) != set(Artifact.__dataclass_fields__):
        raise CheckpointError(f"{where} must have exactly the keys {list(Artifact.__dataclass_fields__)}")
    name = entry["path"]
    rules: dict[str, Callable[[Any], bool]] = {
        "path": lambda value: isinstance(value, str) and is_plain_name(value),
        "kind": lambda value: isinstance(value, str) and kind_of(name) is not None and value == kind_of(name)[0],  # type: ignore[index]
        "required": lambda value: value is (kind_of(name) or ("", None))[1],
        "bytes": lambda value: type(value) is int and value >= 0,
        "sha256": lambda value: isinstance(value, str) and _CHECKSUM.fullmatch(value) is not None,
    }
    for key, is_valid in rules.items():
        if not is_valid(entry[key]):
            raise CheckpointError(f"{where}.{key}={entry[key]!r}: not a valid value for this file")
    return Artifact(**entry)


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is the name of a file in the folder itself: no separator, no step upwards, no drive."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\:\0")


def verify_folder(folder: Path) -> VerificationResult:
    """Compare a folder with its manifest; see the module docstring.

    Raises:
        CheckpointError: the manifest itself is damaged.
    """
    if not (folder / MANIFEST_FILE).exists():
        return VerificationResult(is_present=False)
    artifacts = read_manifest(folder)
    differences: dict[bool, list[str]] = {True: [], False: []}
    sound: list[Artifact] = []
    for artifact in artifacts:
        path = folder / artifact.path
        if not path.is_file():
            if artifact.required or path.exists():
                differences[artifact.required].append(f"{artifact.path}: missing")
        elif (size := path.stat().st_size) != artifact.bytes:
            differences[artifact.required].append(f"{artifact.path}: {size} bytes, the manifest says {artifact.bytes}")
        else:
            sound.append(artifact)
    for artifact, found in zip(sound, file_checksums(folder / artifact.path for artifact in sound), strict=True):
        if found != artifact.sha256:
            differences[artifact.required].append(
                f"{artifact.path}: content {found} is not the {artifact.sha256} of the manifest"
            )
    return VerificationResult(True, len(sound), tuple(differences[True]), tuple(differences[False]), tuple(artifacts))
