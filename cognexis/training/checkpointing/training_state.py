"""``training_state.json``: what a training checkpoint says about its run, and which files must be there to go on.

    step, world_size        when it was written, and by how many processes
    settings                what a continuation must share to be the same run; a difference is refused
    surroundings            what bit equality depends on besides; a difference is reported
    metric                  the validation metric of this step, or null
    running                 loss that was summed up since the last log line, by process, and the step of that line
    nested                  files in sub-folders (sharded states) with sizes and checksums
    extra                   what the trainer keeps besides

The manifest of the folder is written after it and names it, so one checksum covers all of this. A folder without a
model configuration, as adapters and sharded models have it, gets no manifest: ``nested`` then lists its other files.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cognexis.checkpoints.hashing import file_checksums
from cognexis.checkpoints.json_file import read_json, require_schema, write_json
from cognexis.checkpoints.manifest import verify_folder
from cognexis.errors import CheckpointError

STATE_FILE = "training_state.json"
STATE_VERSION = 1
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", STATE_FILE)


@dataclass
class TrainingState:
    """See the module docstring."""

    step: int
    world_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)
    metric: float | None = None
    running: dict[str, Any] = field(default_factory=dict)
    nested: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def write_training_state(folder: Path, state: TrainingState) -> None:
    """Write the file; what the manifest does not cover is hashed into it."""
    listed = (path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE)
    paths = sorted(path for path in listed if path.parent != folder or not has_manifest(folder))
    checksums = file_checksums(paths)
    state.nested = [
        {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, checksums, strict=True)
    ]
    write_json(folder / STATE_FILE, {"schema_version": STATE_VERSION, **asdict(state)})


def has_manifest(folder: Path) -> bool:
    """Whether the folder is that of a whole model, whose files a manifest lists."""
    return (folder / "config.json").is_file()


def read_training_state(folder: Path) -> TrainingState:
    """Parse the file.

    Raises:
        CheckpointError: it is missing, damaged, or of another schema version.
    """
    path = folder / STATE_FILE
    content = read_json(path)
    require_schema(path, content, STATE_VERSION)
    fields = {name: content.get(name) for name in TrainingState.__dataclass_fields__}
    kinds: dict[str, type] = {"settings": dict, "surroundings": dict, "running": dict, "nested": list, "extra": dict}
    kinds |= {"step": int, "world_size": int}
    for name, kind in kinds.items():
        if type(fields[name]) is not kind:
            raise CheckpointError(f"{path}: {name}={fields[name]!r}: must be of type {kind.__name__}")
    return TrainingState(**fields)


def resume_faults(folder: Path) -> list[str]:
    """Why training cannot go on from ``folder``; empty when every file is there and is what was saved."""
    try:
        if not has_manifest(folder):
            return _faults_without_manifest(folder)
        result = verify_folder(folder)
        if not result.is_present:
            return ["has no manifest"]
        named = {artifact.path for artifact in result.artifacts}
        faults = [*result.faults, *(note for note in result.notes if _matters(note.split(":")[0]))]
        faults += [f"{name}: missing" for name in sorted(named) if _matters(name) and not (folder / name).exists()]
        faults += [f"{name}: not in the manifest" for name in _NEEDED if name not in named]
        if "model_weights" not in {artifact.kind for artifact in result.artifacts}:
            faults.append("model weights: not in the manifest")
        return faults or _nested_faults(folder, read_training_state(folder).nested)
    except CheckpointError as error:
        return [str(error)]


def _faults_without_manifest(folder: Path) -> list[str]:
    entries = read_training_state(folder).nested
    named = {str(entry.get("path")) for entry in entries}
    missing = [f"{name}: not listed" for name in ("trainer_state.json", "scheduler.pt") if name not in named]
    return missing + _nested_faults(folder, entries)


def _matters(name: str) -> bool:
    """Whether the state of training lies in this file, which a model loads without."""
    return name.endswith((".pt", ".pth")) or name in (*_NEEDED, "curriculum.json", "data_loader.json")


def _nested_faults(folder: Path, entries: list[dict[str, Any]]) -> list[str]:
    home, faults, sound = folder.resolve(), [], []
    for entry in entries:
        path = (folder / str(entry.get("path"))).resolve()
        if not path.is_relative_to(home):
            faults.append(f"{entry.get('path')}: lies outside the folder")
        elif not path.is_file() or path.stat().st_size != entry.get("bytes"):
            faults.append(f"{entry.get('path')}: missing, or of another size")
        else:
            sound.append((path, entry))
    for found, (_, entry) in zip(file_checksums(path for path, _ in sound), sound, strict=True):
        if found != entry.get("sha256"):
            faults.append(f"{entry['path']}: content {found} is not the {entry['sha256']} of the manifest")
    return faults
