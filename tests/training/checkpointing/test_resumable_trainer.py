"""Saving, resuming and stopping: what is equal afterwards, what is refused, what stays."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from cognexis.checkpoints.manifest import read_manifest
from cognexis.errors import CheckpointError, InvalidConfigError
from cognexis.training.checkpointing.retention import Retention, newest_verified
from cognexis.training.checkpointing.stop_signals import StopSignals
from cognexis.training.checkpointing.training_state import read_training_state, resume_faults
from tests.batteries.interrupted_training import Rows, fingerprint, small_model, small_trainer


class At(TrainerCallback):
    """Does something in the middle of a step, before its last micro-batch."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class Interrupted(Exception):
    """What a test ends a run with."""


def interrupt():
    raise Interrupted


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted: its folder with checkpoints of steps 6, 9 and 12, and its fingerprint."""
    torch.set_deterministic_debug_mode("default")
    folder = tmp_path_factory.mktemp("whole")
    trainer = small_trainer(folder)
    trainer.train()
    return folder, fingerprint(trainer)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that run's folder."""
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_interrupted_run_continues_bit_for_bit(whole, tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.add_callback(At(7, interrupt))
    with pytest.raises(Interrupted):
        trainer.train()
    resumed = small_trainer(tmp_path)
    resumed.train(True)
    assert str(resumed._resumed_from).endswith("checkpoint-6")
    assert fingerprint(resumed) == whole[1]
    assert names(tmp_path) == names(whole[0])


def test_checkpoint_holds_everything_and_its_manifest_names_it(whole):
    folder = whole[0] / "checkpoint-12"
    kinds = {artifact.kind for artifact in read_manifest(folder)}
    assert kinds >= {"model_weights", "optimizer_state", "learning_rate_state", "rng_state", "curriculum_state"}
    assert kinds >= {"data_loader_state", "trainer_state", "config", "metadata", "scheduler_state", "resolved_config"}
    state = read_training_state(folder)
    assert (state.step, state.world_size) == (12, 1)
    assert state.settings["rows_per_step"] == 4 and state.settings["curriculum"]["target_max_loops"] == 4
    assert json.loads((folder / "metadata.json").read_text())["sampled_loops"] == {
        str(n): count for n, count in sorted(json.loads((folder / "curriculum.json").read_text())["histogram"].items())
    }
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (folder / name).is_file()
    assert not [path for path in whole[0].iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "curriculum.json", "data_loader.json"]
)
def test_damaged_checkpoint_is_passed_over_said_and_kept(run, file, caplog):
    flip(run / "checkpoint-12" / file)
    assert newest_verified(run) == run / "checkpoint-9"
    assert "checkpoint-12 is damaged and passed over" in caplog.text and file in caplog.text
    (run / "checkpoint-9" / file).unlink()
    assert newest_verified(run) == run / "checkpoint-6"
    assert names(run) == ["checkpoint-12", "checkpoint-6", "checkpoint-9"]


def test_new_checkpoint_takes_the_place_of_a_damaged_one_which_is_kept(run, whole):
    flip(run / "checkpoint-12" / "model.safetensors")
    trainer = small_trainer(run)
    trainer.train("auto")
    assert fingerprint(trainer) == whole[1]
    assert names(run) == ["checkpoint-12", "checkpoint-12.damaged-0", "checkpoint-6", "checkpoint-9"]
    assert not resume_faults(run / "checkpoint-12") and resume_faults(run / "checkpoint-12.damaged-0")


def test_damaged_checkpoint_that_is_asked_for_is_refused_with_its_faults(run):
    flip(run / "checkpoint-12" / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"training cannot go on from here:\s+optimizer.pt: content"):
        small_trainer(run).train(str(run / "checkpoint-12"))
    (run / "checkpoint-9" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="has no manifest"):
        small_trainer(run).train(str(run / "checkpoint-9"))


def test_finished_run_is_taken_over_without_another_step(run, whole):
    trainer = small_trainer(run)
    assert trainer.train("auto").global_step == 12
    assert trainer.curriculum.state_dict() == whole[1]["curriculum"]
    saved = type(trainer.model).from_pretrained(run / "checkpoint-12").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())


def test_nothing_to_resume_from_is_an_error_and_auto_starts_anew(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint that training can go on from"):
        small_trainer(tmp_path).train(True)
    trainer = small_trainer(tmp_path, max_steps=1, save_strategy="no")
    trainer.train("auto")
    assert trainer.state.global_step == 1


def test_run_with_other_settings_is_refused_with_the_differences_unless_forced(run, caplog):
    with pytest.raises(InvalidConfigError, match=r"learning_rate: saved 0.01, now 0.02; seed: saved 7, now 8"):
        small_trainer(run, learning_rate=0.02, seed=8).train("auto")
    shutil.rmtree(run / "checkpoint-12")
    forced = small_trainer(run, learning_rate=0.02, allow_other_settings=True, max_steps=10)
    forced.train("auto")
    assert forced.state.global_step == 10 and "learning_rate: saved 0.01, now 0.02" in caplog.text


def test_other_surroundings_are_reported(run, caplog):
    shutil.rmtree(run / "checkpoint-12")
    state = json.loads((run / "checkpoint-9" / "training_state.json").read_text())
    assert state["surroundings"]["num_threads"] == torch.get_num_threads()
    trainer = small_trainer(run, dataloader_num_workers=3, max_steps=12)
    trainer.add_callback(At(9, interrupt))
    with pytest.raises(Interrupted):
        trainer.train("auto")
    assert "need not be equal bit by bit: dataloader_num_workers was 0" in caplog.text


def test_stock_trainer_goes_on_from_such_a_checkpoint(run):
    args = TrainingArguments(str(run), max_steps=11, per_device_train_batch_size=2, save_strategy="no", use_cpu=True)
    args.report_to = []
    trainer = Trainer(model=small_model(), args=args, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-9"))
    assert trainer.state.global_step == 11


def test_first_signal_ends_the_step_saves_and_returns(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = small_trainer(tmp_path)
    trainer.add_callback(At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert trainer.stop_signal == signal.SIGTERM and trainer.state.global_step == 5
    assert newest_verified(tmp_path) == tmp_path / "checkpoint-5"
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = small_trainer(tmp_path)
    resumed.train("auto")
    assert resumed.stop_signal is None and fingerprint(resumed) == whole[1]


def test_second_signal_ends_the_process_with_its_number():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143


def full_disk(path):
    return shutil._ntuple_diskusage(10**9, 10**9 - 100, 100)


def test_save_without_room_is_not_begun_and_stops_or_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", full_disk)
    with pytest.raises(CheckpointError, match=r"checkpoint-3: not saved: .* 100 bytes free, a checkpoint needs"):
        small_trainer(tmp_path).train()
    assert names(tmp_path) == []
    trainer = small_trainer(tmp_path, on_save_error="continue", max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and "was not saved, and training goes on" in caplog.text
    with pytest.raises(InvalidConfigError, match="on_save_error='ignore': must be one of stop, continue"):
        small_trainer(tmp_path, on_save_error="ignore")


def test_save_that_fails_midway_leaves_no_trace(run, monkeypatch):
    shutil.rmtree(run / "checkpoint-12")
    before = {path: path.stat().st_mtime_ns for path in Path(run).rglob("*")}
    trainer = small_trainer(run, save_steps=1)

    def fail(*args, **kwargs):
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="checkpoint-10: not saved: no space left"):
        trainer.train("auto")
    assert {path: path.stat().st_mtime_ns for path in Path(run).rglob("*")} == before
    assert newest_verified(run) == run / "checkpoint-9"


def test_best_checkpoints_stay_beside_the_newest(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=8, save_steps=2, retention=Retention(keep_last=1, keep_best=1))
    losses = iter([2.0, 1.0, 3.0, 4.0])
    trainer._last_metric = None

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 2 == 0:
                trainer._determine_best_metric({"eval_loss": next(losses)}, None)

    trainer.callback_handler.callbacks.insert(0, Measure())
    trainer.train()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    assert read_training_state(tmp_path / "checkpoint-4").metric == 1.0
