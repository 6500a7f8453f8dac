"""What the ``config`` commands do, as functions that return text or data; the command line prints it.

A fault of the user is an InvalidConfigError, as everywhere.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cognexis.artifacts.run_config import (
    check_run_config,
    config_from_document,
    default_run_config,
    load_run_config,
    resolve,
    write_resolved,
)
from cognexis.artifacts.run_config.documents import read_document, yaml_text
from cognexis.configuration_cognexis import VARIANTS, CognexisConfig
from cognexis.errors import ConfigFault, InvalidConfigError


def check_command(
    source: str | Path,
    command: str | None = None,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    check_files: bool = False,
) -> tuple[str, list[ConfigFault]]:
    """Check a configuration: its resolved text and no fault, or an empty text and every fault."""
    try:
        config = load_run_config(source, command, overrides, world_size=world_size, check_files=check_files)
        return yaml_text(resolve(config, world_size).document()), []
    except InvalidConfigError as error:
        return "", list(error.faults)


def resolve_command(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    folder: str | os.PathLike[str] | None = None,
    command: str | None = None,
    world_size: int | None = None,
) -> str:
    """The resolved configuration as text; with ``folder`` it is also written there."""
    config = load_run_config(source, command, overrides, world_size=world_size)
    if folder is not None:
        write_resolved(config, folder, world_size)
    return yaml_text(resolve(config, world_size).document())


def show_defaults_command(section: str | None = None) -> str:
    """The defaults of all sections, or of one; null stands for what follows from other settings."""
    document = default_run_config().document()
    if section is None:
        return yaml_text(document)
    if section not in document:
        reason = f"must be one of {', '.join(document)}"
        raise InvalidConfigError(f"section={section!r}: {reason}", path="section", value=section, reason=reason)
    return yaml_text({section: document[section]})


def migrate_command(source: str | Path) -> str:
    """The given settings of an older document in today's layout and canonical names."""
    config = config_from_document(read_document(source))
    check_run_config(config)
    return yaml_text(config.given())


def list_variants_command() -> list[dict[str, Any]]:
    """One row per preset: its name, sizes and loops."""
    fields: tuple[str, ...] = (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "num_prelude_blocks",
    )
    fields += ("num_recurrent_blocks", "num_coda_blocks", "trained_max_loops", "default_loops", "vocab_size")
    rows = []
    for name in VARIANTS:
        config = CognexisConfig.from_variant(name)
        rows.append({"variant": name} | {field: getattr(config, field) for field in fields})
    return rows
