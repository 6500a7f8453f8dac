"""A ``Trainer`` whose checkpoints survive: the files are transformers' own, what is around them is not.

    save      free space is checked; all processes write into a hidden folder; process 0 hashes everything into the
              manifest, forces it to disk and renames the folder into place; then old checkpoints are removed
    resume    the newest checkpoint whose every file matches its manifest; a damaged one is passed over and kept
    continue  weights, moments, schedule, generators, data position, loss sums and the state of subclasses are those
              of the moment of saving, so the rest of the run is bit for bit that of an uninterrupted one (same
              hardware, threads and processes)
    stop      the first SIGTERM or SIGINT ends the step, saves and returns; ``stop_signal`` says which it was

A plain ``Trainer`` can go on from such a folder, and this class reads no others: they have no manifest.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from cognexis.checkpoints.commit import staged_folder
from cognexis.checkpoints.json_file import read_json, write_json
from cognexis.checkpoints.manifest import write_manifest
from cognexis.checkpoints.metadata import TrainingRecord
from cognexis.errors import CheckpointError, InvalidConfigError
from cognexis.training.checkpointing.free_space import require_free_space
from cognexis.training.checkpointing.retention import Retention, newest_verified, prune, set_aside
from cognexis.training.checkpointing.same_run import settings_of, surroundings_of, warn_or_refuse
from cognexis.training.checkpointing.stop_signals import StopSignals
from cognexis.training.checkpointing.training_state import (
    TrainingState,
    has_manifest,
    read_training_state,
    resume_faults,
    write_training_state,
)

logger = logging.getLogger("cognexis.training")

LOADER_FILE = "data_loader.json"
SAVE_ERROR_POLICIES = ("stop", "continue")
_SAVE_ERRORS = (CheckpointError, OSError, RuntimeError, SafetensorError)


class ResumableTrainer(Trainer):
    """Saves, resumes and stops as the module docstring says.

    Args:
        train_loader: batches in place of a ``train_dataset``, from a loader that keeps its own position, such as
            ``cognexis.training.data.loader.TrainingLoader``.
        retention: which checkpoints stay; None takes ``args.save_total_limit`` as the number of newest ones.
        on_save_error: "stop" raises when a checkpoint cannot be written, "continue" trains on and says so.
        data_checksum: ``sha256:...`` of the data manifest, for the checkpoints.
        allow_other_settings: go on from a checkpoint although settings differ.
        kwargs: of ``transformers.Trainer``.

    Attributes:
        stop_signal: number of the signal that ended the last ``train``; None when it ran to its end.
    """

    args: Any
    state: Any
    model: Any

    def __init__(
        self,
        *args: Any,
        train_loader: Any = None,
        retention: Retention | None = None,
        on_save_error: str = "stop",
        data_checksum: str | None = None,
        allow_other_settings: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if on_save_error not in SAVE_ERROR_POLICIES:
            raise InvalidConfigError(
                f"on_save_error={on_save_error!r}: must be one of {', '.join(SAVE_ERROR_POLICIES)}",
                path="on_save_error",
                value=on_save_error,
            )
        self.retention = retention or Retention(self.args.save_total_limit or 0)
        self.args.save_total_limit = None  # transformers would remove checkpoints without looking at them
        self.on_save_error = on_save_error
        self.data_checksum = data_checksum
        self.allow_other_settings = allow_other_settings
        self.stop_signal: int | None = None
        self._signals = StopSignals()
        self._resumed_from: Path | None = None
        self._restores_generators = False
        self._last_metric: tuple[int, float] | None = None
        self._loader: Any = train_loader
        self._has_own_loader = train_loader is not None
        self.add_callback(_RunCallback(self))

    # ---- for subclasses

    def training_record(self) -> TrainingRecord | None:
        """What the checkpoint's ``metadata.json`` shall say of the training; None leaves it to the model."""
        return None

    def settings(self) -> dict[str, Any]:
        """What a continuation must share with this run, as JSON data."""
        return settings_of(self)

    def extra_state(self) -> dict[str, Any]:
        """Further state, as JSON data, for ``training_state.json``."""
        return {}

    def state_files(self) -> dict[str, Any]:
        """Further state in files of its own: file name -> JSON data."""
        return {}

    def load_extra_state(self, extra: dict[str, Any], files: dict[str, Any]) -> None:
        """Take over what ``extra_state`` and ``state_files`` gave."""

    # ---- resuming

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint of this run that training can go on from."""
        return newest_verified(Path(self.args.output_dir))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As in transformers.

        Args:
            resume_from_checkpoint: a folder; True: the newest verified checkpoint of ``args.output_dir``; "auto": the
                same, or the start where there is none.

        Raises:
            CheckpointError: the folder is damaged, or there is nothing to resume from.
            InvalidConfigError: the checkpoint is of a run with other settings.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._resumed_from, self.stop_signal = checkpoint, None
        if checkpoint is not None:
            warn_or_refuse(self, read_training_state(checkpoint), checkpoint)
            if 0 < self.args.max_steps <= read_training_state(checkpoint).step:
                return self._take_over_finished(checkpoint)
            logger.warning("training goes on from %s", checkpoint)
        with StopSignals() as self._signals:
            path = None if checkpoint is None else str(checkpoint)
            return super().train(path, trial, ignore_keys_for_eval)

    def _take_over_finished(self, checkpoint: Path) -> TrainOutput:
        """Load a run that has taken all its steps; transformers would take one more."""
        logger.warning("%s has taken all %d steps; nothing is left to do", checkpoint, self.args.max_steps)
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        files = {name: read_json(checkpoint / name) for name in self.state_files()}
        self.load_extra_state(read_training_state(checkpoint).extra, files)
        return TrainOutput(self.state.global_step, 0.0, {})

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        if wanted in (True, "auto"):
            found = self._from_main_process(self.newest_checkpoint)
            if found is None and wanted is True:
                raise CheckpointError(f"{self.args.output_dir}: holds no checkpoint that training can go on from")
            return found
        path = Path(str(wanted))
        faults = self._from_main_process(lambda: resume_faults(path))
        if faults:
            listed = "\n  ".join(faults)
            raise CheckpointError(f"{path}: training cannot go on from here:\n  {listed}")
        return path

    def get_train_dataloader(self) -> Any:
        """The loader; one with a state of its own starts where the checkpoint stopped."""
        if not self._has_own_loader:
            self._loader = super().get_train_dataloader()
        self._position_loader()
        return self._loader

    def _position_loader(self) -> None:
        if not _has_position(self._loader):
            return
        self.args.ignore_data_skip = True  # it is positioned, so nothing is left to skip
        if self._resumed_from is not None and (self._resumed_from / LOADER_FILE).is_file():
            self._loader.load_state_dict(read_json(self._resumed_from / LOADER_FILE))
            self._restores_generators = True

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """As in transformers; what starting the loader drew from the generators of a resumed run is taken back."""
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._restores_generators:
            self._restores_generators = False
            self._load_rng_state(str(self._resumed_from))
        return found

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def restore_run(self) -> None:
        """Take over the rest of the checkpoint's state; called when transformers has loaded its own."""
        if self._resumed_from is None:
            return
        self.state.compute_steps(self.args, self.state.max_steps)  # how often to log and save is this run's choice
        state = read_training_state(self._resumed_from)
        losses = state.running.get("loss") or []
        if losses and all(isinstance(loss, float) for loss in losses):
            own = losses[self.args.process_index] if len(losses) == self.args.world_size else sum(losses) / len(losses)
            self._tr_loss.fill_(own)
            self._globalstep_last_logged = int(state.running["last_logged"])
        files = {name: read_json(self._resumed_from / name) for name in self.state_files()}
        self.load_extra_state(state.extra, files)

    # ---- saving

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.args.metric_for_best_model or "loss"
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        if isinstance(value, float) and math.isfinite(value):
            self._last_metric = (self.state.global_step, value)
        return super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save everything, or leave no trace; see the module docstring."""
        run_folder = Path(self._get_output_dir(trial))
        folder = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        error: Exception | None = None
        try:
            with self._staged(folder) as staging:
                self._write_checkpoint(staging, folder)
        except _SAVE_ERRORS as caught:
            error = caught
        if message := self._first_message(None if error is None else str(error)):
            if self.on_save_error == "stop":
                raise CheckpointError(f"{folder}: not saved: {message}") from error
            logger.warning("%s was not saved, and training goes on: %s", folder, message)
            return
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            prune(run_folder, self.retention, [folder, *([Path(best)] if best else [])])
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    @contextlib.contextmanager
    def _staged(self, folder: Path) -> Iterator[Path]:
        """A folder that all processes write into; it becomes ``folder`` when all of them are done without an error."""
        with contextlib.ExitStack() as stack:
            place: Path | None = None
            error: Exception | None = None
            if self.args.should_save:
                try:
                    require_free_space(folder.parent, self.model, self.optimizer)
                    if folder.is_dir() and resume_faults(folder):
                        set_aside(folder)
                    place = stack.enter_context(staged_folder(folder))
                except (CheckpointError, OSError) as caught:
                    error = caught
            shared: list[Any] = [None if place is None else str(place), None if error is None else str(error)]
            if self.args.world_size > 1:
                dist.broadcast_object_list(shared, src=0)
            if shared[1] is not None:
                raise CheckpointError(shared[1]) from error
            try:
                yield Path(shared[0])
            except _SAVE_ERRORS as caught:
                error = caught
            # Nothing is committed unless every process has written its part.
            if message := self._first_message(None if error is None else str(error)):
                raise CheckpointError(message) from error
            if self.args.should_save:
                self._write_manifest(Path(shared[0]))

    def _write_checkpoint(self, staging: Path, folder: Path) -> None:
        record = self.training_record()
        if record is not None:
            if self.data_checksum is not None:
                record.data_manifest_checksum = self.data_checksum
            getattr(self, "language_model", self.model).training_record = record
        self.save_model(str(staging), _internal_call=True)
        if self.state.best_global_step:
            best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        running = self._tr_loss.detach().double().cpu()
        losses = self.accelerator.gather(running[None].to(self.args.device, torch.float32)).tolist()
        if not self.args.should_save:
            return
        self._export_callback_states()
        self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        for name, content in self.state_files().items():
            write_json(staging / name, content)
        if _has_position(self._loader):
            write_json(staging / LOADER_FILE, self._loader.state_dict())
        self._state_to_write = TrainingState(
            step=self.state.global_step,
            world_size=self.args.world_size,
            settings=self.settings(),
            surroundings=surroundings_of(self),
            metric=self._metric_of_this_step(),
            running={
                "loss": losses if all(map(math.isfinite, losses)) else None,
                "last_logged": self._globalstep_last_logged,
            },
            extra=self.extra_state(),
        )

    def _write_manifest(self, staging: Path) -> None:
        write_training_state(staging, self._state_to_write)
        if has_manifest(staging):
            write_manifest(staging)

    def _metric_of_this_step(self) -> float | None:
        is_current = self._last_metric is not None and self._last_metric[0] == self.state.global_step
        return self._last_metric[1] if is_current and self._last_metric is not None else None

    def _export_callback_states(self) -> None:
        """Bring ``state.stateful_callbacks`` up to date, as transformers does before it writes the state."""
        exportable = [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]
        for name in {type(callback).__name__ for callback in exportable}:
            states = [callback.state() for callback in exportable if type(callback).__name__ == name]
            kept = self.state.stateful_callbacks.get(name)
            self.state.stateful_callbacks[name] = states if isinstance(kept, list) else states[-1]

    # ---- several processes

    def any_process(self, flag: bool) -> bool:
        """Whether ``flag`` holds on some process; all of them get the answer."""
        if self.args.world_size <= 1:
            return flag
        flags = torch.tensor(float(flag), device=self.args.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def _first_message(self, message: str | None) -> str | None:
        if self.args.world_size <= 1:
            return message
        found: list[Any] = [None] * self.args.world_size
        dist.all_gather_object(found, message)
        return next((text for text in found if text), None)

    def _from_main_process(self, ask: Any) -> Any:
        answer = [ask() if self.args.process_index == 0 else None]
        if self.args.world_size > 1:
            dist.broadcast_object_list(answer, src=0)
        return answer[0]


class _RunCallback(TrainerCallback):
    """Restores the rest of a checkpoint, and turns a signal into an end with a checkpoint."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restore_run()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader = self.trainer._loader
        if _has_position(loader):  # transformers would count from where this call of train() began
            rows = state.global_step * args.gradient_accumulation_steps * loader.rows_per_step
            state.epoch = rows / loader.order.rows_per_epoch
        received = self.trainer._signals.received
        if self.trainer.any_process(received is not None):
            self.trainer.stop_signal = received or 15
            control.should_save = control.should_training_stop = True


def _has_position(loader: Any) -> bool:
    """Whether a loader of ours keeps its own position; accelerate's need its own configuration for that."""
    return hasattr(loader, "state_after")
