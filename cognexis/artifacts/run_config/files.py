"""The files around a run configuration: those it names, and the resolved one that every command writes."""

import os
from collections.abc import Iterator
from pathlib import Path

from cognexis.artifacts.run_config.documents import yaml_text
from cognexis.artifacts.run_config.other_sections import HELD_OUT_TEXT
from cognexis.artifacts.run_config.resolving import resolve
from cognexis.artifacts.run_config.run_config import RunConfig
from cognexis.checkpoints.json_file import write_bytes
from cognexis.errors import ConfigFault

RESOLVED_NAME = "config.resolved.yaml"


def missing_files(config: RunConfig) -> list[ConfigFault]:
    """A fault for each file that is named and does not exist."""
    return [
        ConfigFault(path, name, "no such file or folder") for path, name in _named_files(config) if not _exists(name)
    ]


def _exists(name: str) -> bool:
    try:
        return os.path.exists(name)
    except ValueError:  # a NUL byte
        return False


def _named_files(config: RunConfig) -> Iterator[tuple[str, str]]:
    named: dict[str, str | None] = {}
    if config.tokenizer is not None:
        named |= {f"tokenizer.{n}": getattr(config.tokenizer, n) for n in ("path", "manifest_path")}
    if config.training is not None:
        data = config.training.data
        named |= {f"training.data.{n}": getattr(data, n) for n in ("train_manifest", "validation_manifest")}
    if config.evaluation is not None:
        sets = enumerate(config.evaluation.datasets)
        named |= {f"evaluation.datasets[{i}].path": d.path for i, d in sets if d.path != HELD_OUT_TEXT}
    yield from ((path, name) for path, name in named.items() if name is not None)


def write_resolved(config: RunConfig, folder: str | os.PathLike[str], world_size: int | None = None) -> Path:
    """Write the fully expanded configuration as ``config.resolved.yaml``.

    The file is written under a temporary name, forced to disk and then put in place, so that a reader sees the old
    file or the new one. Reading it gives a configuration equal to ``resolve(config)``.

    Args:
        folder: created if it does not exist.
        world_size: see :func:`resolve`.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    path = target / RESOLVED_NAME
    write_bytes(path, yaml_text(resolve(config, world_size).document()).encode("utf-8"))
    return path
