"""Check an adapter against the model that it shall change, before a weight of it is put in place."""

import json
from pathlib import Path
from typing import Any

from cognexis.checkpoints.json_file import read_json
from cognexis.checkpoints.weights import read_headers
from cognexis.errors import CheckpointError

_ADAPTER_WEIGHTS, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# Low-rank matrices by the end of their names: which side of the layer they meet, and the axis that must fit it.
_SIDES = {"lora_A.weight": ("in_features", 1), "lora_B.weight": ("out_features", 0)}
_TRAILING = {"lora_embedding_A": ("num_embeddings", 1), "lora_embedding_B": ("embedding_dim", 0)}


def check_adapter(model: Any, folder: Path, name: str) -> None:
    """Compare the files of an adapter with the layers of ``model``.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``; a Hub identifier is left to PEFT.
        name: the name that the adapter shall have.

    Raises:
        CheckpointError: the name is taken, a file is missing or damaged, or a matrix belongs to no layer of the model
            or does not fit it.
    """
    if name in (getattr(model, "peft_config", None) or {}):
        raise CheckpointError(f"adapter {name!r} is already loaded; unload it or choose another adapter_name")
    if not folder.is_dir():
        return
    config = read_json(folder / _ADAPTER_CONFIG)
    weights = folder / _ADAPTER_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{folder}: no {_ADAPTER_WEIGHTS}; adapters are read from safetensors only")
    layers = dict(model.named_modules())
    faults = []
    for key, header in read_headers([weights]).items():
        for ending, (side, axis) in {**_SIDES, **_TRAILING}.items():
            if key.endswith(f".{ending}"):
                path = key.removeprefix(_PREFIX).removesuffix(f".{ending}")
                layer = layers.get(path)
                size = getattr(getattr(layer, "base_layer", layer), side, None)
                if size is None:
                    faults.append(f"{path}: the model has no such layer")
                elif header.shape[axis] != size:
                    faults.append(f"{key}: shape {list(header.shape)}, the layer has {side}={size}")
    if faults:
        base = json.dumps(config.get("base_model_name_or_path") if isinstance(config, dict) else None)
        raise CheckpointError(
            f"{folder}: the adapter was trained for another model (its base_model_name_or_path is {base}):\n  "
            + "\n  ".join(faults[:8])
        )
