"""Is a checkpoint one of this run?

Two runs are the same when seed, data, model, optimizer, schedule, rows per step and losses are. Threads, worker
processes, devices and library versions may differ, but then the continuation need not be equal bit by bit.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from cognexis.errors import InvalidConfigError
from cognexis.training.checkpointing.training_state import TrainingState

logger = logging.getLogger("cognexis.training")

_ARGUMENTS = (
    *("seed", "data_seed", "max_steps", "num_train_epochs", "optim", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
)
_IGNORED_OF_MODEL = ("transformers_version", "use_cache", "dtype", "_name_or_path", "architectures")


def settings_of(trainer: Any) -> dict[str, Any]:
    """What two runs must share to be the same run, as JSON data."""
    args = trainer.args
    settings = {name: _plain(getattr(args, name)) for name in _ARGUMENTS}
    settings["rows_per_step"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size // trainer.get_tp_size()
    )
    settings["data_checksum"] = trainer.data_checksum
    config = getattr(trainer.model, "config", None)
    if config is not None and hasattr(config, "to_diff_dict"):
        model = {name: _plain(value) for name, value in config.to_diff_dict().items()}
        settings["model"] = {name: value for name, value in sorted(model.items()) if name not in _IGNORED_OF_MODEL}
    return settings


def surroundings_of(trainer: Any) -> dict[str, Any]:
    """What bit equality depends on besides."""
    return {
        "world_size": trainer.args.world_size,
        "num_threads": torch.get_num_threads(),
        "dataloader_num_workers": trainer.args.dataloader_num_workers,
        "device": trainer.args.device.type,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }


def warn_or_refuse(trainer: Any, saved: TrainingState, checkpoint: Path) -> None:
    """Compare a checkpoint with the run that wants to go on from it.

    Raises:
        InvalidConfigError: settings differ, and ``trainer.allow_other_settings`` is off.
    """
    now = trainer.settings()
    names = sorted(set(saved.settings) | set(now))
    differing = [name for name in names if saved.settings.get(name) != now.get(name)]
    if differing:
        listed = "; ".join(f"{name}: saved {saved.settings.get(name)!r}, now {now.get(name)!r}" for name in differing)
        if not trainer.allow_other_settings:
            raise InvalidConfigError(
                f"{checkpoint}: is of a run with other settings: {listed}. Pass allow_other_settings=True to go on",
                path=differing[0],
            )
        logger.warning("%s: is of a run with other settings: %s", checkpoint, listed)
    here = surroundings_of(trainer)
    others = [f"{name} was {value!r}" for name, value in saved.surroundings.items() if here.get(name) != value]
    if others:
        logger.warning("%s: the continuation need not be equal bit by bit: %s", checkpoint, ", ".join(others))


def _plain(value: Any) -> Any:
    """JSON data as reading it back gives it: enumerations by value, keys as text, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    value = getattr(value, "value", value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
