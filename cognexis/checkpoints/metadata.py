"""``metadata.json`` and ``scheduler.json``: what a checkpoint says about itself.

``metadata.json`` states facts of the saved model (parameters, dtype, tokenizer, software, hardware) and what its
training recorded (steps, tokens, loop counts, data). What nobody told the model is null, never zero. Facts of the
training travel on when a loaded model is saved again.
"""

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from cognexis.checkpoints.commit import staged_folder
from cognexis.checkpoints.json_file import read_bytes, read_json, require_schema, write_json
from cognexis.checkpoints.manifest import refresh_manifest
from cognexis.errors import ArtifactMismatchError, CheckpointError, InvalidConfigError

METADATA_FILE = "metadata.json"
SCHEDULER_FILE = "scheduler.json"
RESOLVED_FILE = "config.resolved.yaml"
TOKENIZER_MANIFEST_FILE = "tokenizer_manifest.json"
SCHEMA_VERSION = 1
_RESOLVED_LIMIT = 2**20


@dataclass
class TrainingRecord:
    """What training knows about a model and the model cannot know itself; ``None`` means unknown.

    Attributes:
        checkpoint_step: optimizer steps behind the weights.
        training_tokens_seen: tokens behind the weights.
        data_manifest_checksum: ``sha256:...`` of the data manifest.
        sampled_loops: loop count -> optimizer steps taken with it.
        build_id: version, and commit where known, of the software that trained.
    """

    checkpoint_step: int | None = None
    training_tokens_seen: int | None = None
    data_manifest_checksum: str | None = None
    sampled_loops: dict[int, int] | None = None
    build_id: str | None = None


def metadata_of(model: Any, record: TrainingRecord, tokenizer: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of ``metadata.json``.

    Args:
        tokenizer: ``tokenizer_facts`` of the folder; None when no tokenizer lies there.
    """
    config = model.config
    device = model.device
    known = asdict(record)
    known["sampled_loops"] = {str(loops): steps for loops, steps in (record.sampled_loops or {}).items()} or None
    return {
        "schema_version": SCHEMA_VERSION,
        **known,
        "architecture": type(model).__name__,
        "tensor_dtype": str(model.dtype).removeprefix("torch."),
        "parameter_count": model.num_parameters(),
        "recurrent_blocks_stored": config.num_recurrent_blocks,
        "trained_max_loops": config.trained_max_loops,
        "scheduler_mode": model.scheduler_record["scheduler"]["type"],
        "tokenizer_checksum": config.tokenizer_checksum,
        "chat_template": None,
        **{key: value for key, value in (tokenizer or {}).items() if value is not None},
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "backend": device.type,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }


def tokenizer_facts(folder: Path) -> dict[str, Any] | None:
    """What ``metadata.json`` repeats of the tokenizer in ``folder``; None where there is no tokenizer manifest."""
    path = folder / TOKENIZER_MANIFEST_FILE
    if not path.is_file():
        return None
    content = read_json(path, limit=2**24)
    return {"tokenizer_checksum": content.get("checksum"), "chat_template": content.get("chat_template")}


def record_tokenizer(staging: Path, folder: Path) -> None:
    """Write into ``staging``, which holds a tokenizer, the records of the checkpoint ``folder`` that it changes."""
    if (metadata := read_metadata(folder)) is not None:
        write_json(staging / METADATA_FILE, metadata | (tokenizer_facts(staging) or {}))
    refresh_manifest(staging, folder)


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """Parse ``metadata.json``; None where there is none.

    Raises:
        CheckpointError: it is damaged, of another schema version, or a value has the wrong type.
    """
    path = folder / METADATA_FILE
    if not path.exists():
        return None
    content = read_json(path, limit=2**20)
    require_schema(path, content, SCHEMA_VERSION)
    if not isinstance(content.get("tensor_dtype"), str) or not content["tensor_dtype"]:
        raise CheckpointError(f"{path}: tensor_dtype={content.get('tensor_dtype')!r}: must name a dtype")
    for name in ("checkpoint_step", "training_tokens_seen", "parameter_count"):
        value = content.get(name)
        if value is not None and (type(value) is not int or value < 0):
            raise CheckpointError(f"{path}: {name}={value!r}: must be a count or null")
    loops = content.get("sampled_loops")
    if loops is not None and not (
        isinstance(loops, dict) and all(str(key).isdecimal() and type(value) is int for key, value in loops.items())
    ):
        raise CheckpointError(f"{path}: sampled_loops={loops!r}: must map loop counts to numbers of steps, or be null")
    return content


def training_record(metadata: dict[str, Any] | None) -> TrainingRecord:
    """The facts of training in a ``metadata.json``."""
    known = {name: (metadata or {}).get(name) for name in TrainingRecord.__dataclass_fields__}
    if known["sampled_loops"] is not None:
        known["sampled_loops"] = {int(loops): steps for loops, steps in known["sampled_loops"].items()}
    return TrainingRecord(**known)


def scheduler_state(
    scheduler: dict[str, Any] | None = None,
    value_head: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``scheduler.json``: how loops are chosen, and what a learned choice needs.

    Args:
        scheduler: ``{"type": ...}`` with the fields of that scheduler; None: fixed loop counts.
        value_head: how the head was fitted and what was measured about it; its weights are the model's
            ``model.value_head.*``, its settings stand in ``config.json``.
        calibration: the map of the head's predictions, as ``ValueHead.set_calibration`` takes it.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "scheduler": scheduler or {"type": "fixed"},
        "value_head": value_head,
        "calibration": calibration,
    }


def write_scheduler(folder: Path, model: Any) -> None:
    """Bring the saved checkpoint ``folder`` of ``model`` up to date with ``model.scheduler_record``, in one step.

    Weights and configuration stay as they are on disk.

    Raises:
        CheckpointError: the folder cannot be written, or the record is no scheduler state.
        ArtifactMismatchError: the record contradicts ``config.resolved.yaml``. Nothing is changed then.
    """
    record = model.scheduler_record
    with staged_folder(folder) as staging:
        write_json(staging / SCHEDULER_FILE, record)
        if (metadata := read_metadata(folder)) is not None:
            write_json(staging / METADATA_FILE, metadata | {"scheduler_mode": record["scheduler"]["type"]})
        for writer in model._folder_writers:
            writer(staging, model, folder)
        place = staging if (staging / RESOLVED_FILE).exists() else folder
        check_scheduler(place / SCHEDULER_FILE, record)
        refresh_manifest(staging, folder)


def read_scheduler(folder: Path) -> dict[str, Any] | None:
    """Parse ``scheduler.json``; None where there is none, which means fixed loop counts.

    Raises:
        CheckpointError: it is damaged or of another schema version.
        ArtifactMismatchError: it contradicts the scheduler of ``config.resolved.yaml`` in the same folder.
    """
    path = folder / SCHEDULER_FILE
    if not path.exists():
        return None
    content = read_json(path, limit=2**20)
    check_scheduler(path, content)
    return content


def check_scheduler(path: Path, content: Any) -> None:
    """Raise unless ``content`` may stand in the ``scheduler.json`` at ``path``; see :func:`read_scheduler`."""
    require_schema(path, content, SCHEMA_VERSION)
    scheduler = content.get("scheduler")
    if not isinstance(scheduler, dict) or not isinstance(scheduler.get("type"), str):
        raise CheckpointError(f"{path}: scheduler must be an object with a type")
    for name in ("value_head", "calibration"):
        if not isinstance(content.get(name), dict | None):
            raise CheckpointError(f"{path}: {name} must be an object or null")
    resolved = _resolved_scheduler(path.parent)
    if (gain := resolved.pop("predicted_gain_threshold", None)) is not None and scheduler["type"] == resolved.get(
        "type"
    ):
        resolved["gain_threshold"] = gain
    for name in sorted(set(scheduler) & set(resolved)):
        if scheduler[name] != resolved[name]:
            raise ArtifactMismatchError(
                f"{path}: scheduler.{name}={scheduler[name]!r}, but {RESOLVED_FILE} says {resolved[name]!r}",
                path=f"scheduler.{name}",
                value=scheduler[name],
                reason=f"{RESOLVED_FILE} says {resolved[name]!r}",
            )


def _resolved_scheduler(folder: Path) -> dict[str, Any]:
    """The section inference.scheduler of the resolved run configuration, empty where there is none."""
    path = folder / RESOLVED_FILE
    if not path.exists():
        return {}
    import yaml

    try:
        content = yaml.safe_load(read_bytes(path, _RESOLVED_LIMIT))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidConfigError(f"{path}: not valid YAML: {error}") from error
    inference = content.get("inference") if isinstance(content, dict) else None
    scheduler = inference.get("scheduler") if isinstance(inference, dict) else None
    return scheduler if isinstance(scheduler, dict) else {}
