"""A small training run that can be ended at any moment, in children of a fork so that nothing is imported twice.

The run has what makes continuing hard: dropout, accumulated gradients, a curriculum that grows, moments, a schedule, a
loader with a position of its own, a log line that sums up over several steps.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from cognexis.training.checkpointing.retention import Retention
from cognexis.training.curriculum import CurriculumSettings
from cognexis.training.data.loader import TrainingLoader
from cognexis.training.data.order import RowOrder
from cognexis.training.options import TrainerOptions
from cognexis.training.trainer import CognexisTrainer
from tests.batteries.tiny import tiny_config, tiny_model

STEPS = 12


class Rows(Dataset[Any]):
    """Random rows, always the same."""

    def __init__(self, count: int = 40, length: int = 8) -> None:
        self.ids = torch.randint(4, 30, (count, length), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of rows of equal length."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def small_model() -> Any:
    """A model of some thousand parameters with dropout in every stage."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_prelude_blocks": 1, "max_position_embeddings": 16}
    return tiny_model(tiny_config(**sizes, embedding_dropout=0.1, ffn_dropout=0.1))


def small_trainer(folder: Path, **changes: Any) -> CognexisTrainer:
    """The trainer of the run; ``changes`` are training arguments, or keywords of the trainer under their names."""
    names = ("retention", "on_save_error", "allow_other_settings", "options")
    own = {name: changes.pop(name) for name in names if name in changes}
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"learning_rate": 1e-2, "warmup_steps": 3, "lr_scheduler_type": "cosine", "logging_steps": 2}
    settings |= {"save_steps": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 7}
    args = TrainingArguments(str(folder), **settings | changes)
    rows = Rows()
    loader = TrainingLoader(
        rows,
        RowOrder(len(rows), seed=7),
        stacked,
        batch_size=args.per_device_train_batch_size,
        rank=args.process_index,
        world_size=args.world_size,
    )
    rule = CurriculumSettings(target_max_loops=4, initial_max_loops=1, warmup_steps=2, ramp_steps=8)
    options = own.pop("options", TrainerOptions(loop_grad_normalization="by_loops"))
    own.setdefault("retention", Retention(keep_last=3))
    return CognexisTrainer(
        model=small_model(), args=args, train_loader=loader, curriculum=rule, options=options, **own
    )


def fingerprint(trainer: CognexisTrainer) -> dict[str, Any]:
    """All that must be equal bit by bit at the end of two runs."""
    weights = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    moments = hashlib.sha256()
    for state in trainer.optimizer.state_dict()["state"].values():
        for name, value in sorted(state.items()):
            moments.update(name.encode() + torch.as_tensor(value).numpy().tobytes())
    lines = [{k: v for k, v in line.items() if not k.startswith("data/")} for line in trainer.state.log_history]
    return {
        "weights": weights.hexdigest(),
        "moments": moments.hexdigest(),
        "schedule": trainer.lr_scheduler.state_dict()["last_epoch"],
        "generator": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "curriculum": trainer.curriculum.state_dict(),
        "loader": trainer._loader.state_dict(),
        "log": [line for line in lines if "loss" in line],
        "operations": trainer.state.total_flos,
    }


def train_to_the_end(folder: Path, report: Path, **changes: Any) -> None:
    """Train on from whatever is there, and leave the fingerprint in ``report`` if the end is reached."""
    torch.manual_seed(0)
    trainer = small_trainer(folder, **changes)
    trainer.train("auto")
    if trainer.optimizer is None:  # ended between its last save and its report: the last steps are taken again
        shutil.rmtree(trainer.newest_checkpoint())
        trainer = small_trainer(folder, **changes)
        trainer.train("auto")
    if trainer.stop_signal is None:
        report.write_text(json.dumps(fingerprint(trainer)))


def in_child(action: Callable[[], Any]) -> int:
    """Start ``action`` in a child and return its process number."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            torch.set_num_threads(1)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            action()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    return child


def wait_for(child: int) -> int:
    """The exit code of a child; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
