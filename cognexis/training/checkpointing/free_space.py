"""Is there room for a checkpoint?"""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from cognexis.errors import CheckpointError

_MARGIN = 2**20


def checkpoint_bytes(model: Any, optimizer: Any) -> int:
    """Bytes of the weights and of the optimizer's state, on this process; a little more for everything else."""
    tensors = {id(parameter): parameter for parameter in model.parameters()}
    total = sum(parameter.numel() * parameter.element_size() for parameter in tensors.values())
    for state in getattr(optimizer, "state", {}).values():
        total += sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))
    return total + _MARGIN


def require_free_space(folder: Path, model: Any, optimizer: Any) -> None:
    """Refuse to begin a save that cannot end well.

    Raises:
        CheckpointError: says how much is there and how much is needed.
    """
    place = folder
    while not place.exists():
        place = place.parent
    needed, free = checkpoint_bytes(model, optimizer), shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(f"{place}: {free:,} bytes free, a checkpoint needs {needed:,}")
