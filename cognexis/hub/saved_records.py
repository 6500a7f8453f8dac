"""What the package adds to every saved model: the model card and the resolved run configuration."""

import logging
from pathlib import Path
from typing import Any

from cognexis.checkpoints.metadata import RESOLVED_FILE, tokenizer_facts
from cognexis.errors import InvalidConfigError
from cognexis.hub.model_card import write_model_card

logger = logging.getLogger(__name__)


def write_saved_records(folder: Path, model: Any, target: Path) -> None:
    """Write README.md and ``config.resolved.yaml`` into ``folder``, which becomes ``target``.

    A model whose generation settings no run configuration allows is saved without the latter, with a warning.

    Args:
        folder: where the files of the save are gathered.
        model: the model that is saved.
        target: the checkpoint as it was before; a README of another author stays, its tokenizer is described.
    """
    # Imported at the first save: the typed sections take half as long to build as the rest of the package to import.
    from cognexis.artifacts.run_config import run_config_of_checkpoint, write_resolved

    write_model_card(folder, model, target)
    checksum = (tokenizer_facts(target) or {}).get("tokenizer_checksum")
    generation_config = getattr(model, "generation_config", None)
    try:
        resolved = run_config_of_checkpoint(
            model.config,
            generation_config,
            tokenizer_checksum=checksum,
            dtype=model.dtype,
            scheduler=model.scheduler_record["scheduler"],
        )
    except InvalidConfigError as error:
        logger.warning(f"{target}: saved without {RESOLVED_FILE}: {error}")
    else:
        write_resolved(resolved, folder)
