"""Look at a checkpoint without loading it: what it says about itself, its tensors, and whether its files are whole."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from cognexis.checkpoints.commit import finish_interrupted_save
from cognexis.checkpoints.manifest import MANIFEST_FILE, verify_folder
from cognexis.checkpoints.metadata import read_metadata, read_scheduler
from cognexis.checkpoints.weights import check_weights, read_headers, weight_files
from cognexis.configuration_cognexis import CognexisConfig
from cognexis.errors import CheckpointError, CognexisError
from cognexis.modeling_cognexis import CognexisForCausalLM, CognexisModel
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.tokens.match import check_tokenizer_match

_STAGES = ("embed_tokens", "prelude", "recurrent", "coda", "final_norm", "lm_head")


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Describe a checkpoint folder.

    Returns:
        ``metadata`` and ``scheduler`` as stored (or None), ``architecture``, ``tensors`` as name -> shape and dtype,
        ``parameters`` by stage with the shared core counted once, ``files`` with checksums, ``tokenizer``, and
        ``faults``: everything that loading would refuse. An empty list means that it would load.

    Raises:
        CheckpointError: there is no such folder, or it holds no checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    finish_interrupted_save(folder)
    if not (folder / "config.json").exists() and not (folder / MANIFEST_FILE).exists():
        raise CheckpointError(f"{folder}: holds no checkpoint (neither config.json nor {MANIFEST_FILE})")
    faults: list[str] = []
    notes: list[str] = []

    def attempt(read: Any) -> Any:
        try:
            return read()
        except (CognexisError, OSError, ValueError) as error:
            faults.append(str(error))
            return None

    verification = attempt(lambda: verify_folder(folder))
    if verification is not None:
        faults += verification.faults
        notes += verification.notes
        if not verification.is_present:
            notes.append(f"no {MANIFEST_FILE}: the files are unverified")
    config = attempt(lambda: CognexisConfig.from_pretrained(folder))
    headers = attempt(lambda: read_headers(weight_files(folder))) or {}
    if not headers:
        notes.append("no weights in safetensors format")
    elif config is not None:
        attempt(lambda: check_weights(_skeleton(config), headers))
    return {
        "folder": str(folder),
        "faults": list(dict.fromkeys(faults)),
        "notes": notes,
        "metadata": attempt(lambda: read_metadata(folder)),
        "scheduler": attempt(lambda: read_scheduler(folder)),
        "architecture": None if config is None else _architecture(config),
        "parameters": _parameters(headers),
        "tensors": {
            name: {"shape": list(header.shape), "dtype": header.dtype, "file": header.file.name}
            for name, header in sorted(headers.items())
        },
        "files": [
            {"path": artifact.path, "kind": artifact.kind, "bytes": artifact.bytes, "sha256": artifact.sha256}
            for artifact in (verification.artifacts if verification else ())
        ],
        "tokenizer": _tokenizer(folder, config, attempt),
    }


def _skeleton(config: CognexisConfig) -> Any:
    names = config.architectures or ["CognexisForCausalLM"]
    with torch.device("meta"):
        return CognexisForCausalLM(config) if names[0] == "CognexisForCausalLM" else CognexisModel(config)


def _architecture(config: CognexisConfig) -> dict[str, Any]:
    return {
        "class": config.architectures[0] if config.architectures else None,
        "hidden_size": config.hidden_size,
        "blocks": f"{config.num_prelude_blocks} + {config.num_recurrent_blocks} shared + {config.num_coda_blocks}",
        "default_loops": config.default_loops,
        "trained_max_loops": config.trained_max_loops,
        "effective_depth": {
            str(loops): config.effective_depth(loops)
            for loops in dict.fromkeys((1, config.default_loops, config.trained_max_loops))
        },
        "vocab_size": config.vocab_size,
        "nonstandard_features": list(config.nonstandard_features),
    }


def _parameters(headers: dict[str, Any]) -> dict[str, int]:
    count: Counter[str] = Counter()
    for name, header in headers.items():
        stage = name.removeprefix("model.").split(".")[0]
        count[stage if stage in _STAGES else "other"] += _numel(header.shape)
    stages = {stage: count[stage] for stage in (*_STAGES, "other") if count[stage]}
    return {"total": sum(count.values()), **stages}


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _tokenizer(folder: Path, config: CognexisConfig | None, attempt: Any) -> dict[str, Any] | None:
    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer = attempt(lambda: CognexisTokenizer.from_pretrained(folder))
    if tokenizer is None:
        return None
    if config is not None:
        attempt(lambda: check_tokenizer_match(config, tokenizer))
    return {"size": len(tokenizer), "checksum": tokenizer.checksum}
