"""One of two processes ends in the middle of a save: the other one stops soon, and both go on as if nothing was."""

import json
import os
import shutil
import signal
import socket
import time

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import TrainerCallback

from cognexis.modeling_cognexis import CognexisPreTrainedModel
from cognexis.training.checkpointing.retention import newest_verified
from tests.batteries.crash_points import count_and_crash
from tests.batteries.interrupted_training import fingerprint, in_child, small_trainer, wait_for

pytestmark = pytest.mark.slow

IS_NIGHTLY = os.environ.get("COGNEXIS_FAULTS", "ci") == "nightly"
KILLS = 40 if IS_NIGHTLY else 10
SAVE = 6
CRASHED = 77


class CrashInSave(TrainerCallback):
    """Ends this process before the given file-system event of the save after step ``SAVE``."""

    def __init__(self, event):
        self.event = event

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVE:
            count_and_crash(self.event)


def train(folder, report, world_size, crash_at=None):
    """Train on to the end in this process and leave its fingerprint and the rows of each step."""
    trainer = small_trainer(folder, per_device_train_batch_size=4 // world_size)
    rows = {}
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.setdefault(trainer.state.global_step + 1, []).extend(
            kwargs["input_ids"].tolist()
        ),
        with_kwargs=True,
    )
    if crash_at is not None:
        trainer.add_callback(CrashInSave(crash_at))
    trainer.train("auto")
    found = fingerprint(trainer) | {"rows": rows}
    report.with_suffix(f".{trainer.args.process_index}").write_text(json.dumps(found))


def start(world_size, folder, report, crash_rank=None, event=None):
    """Start the ranks of a run; their process numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank_of(rank):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        if world_size > 1:
            os.environ.update({name: str(value) for name, value in place.items()})
        for state in (AcceleratorState, PartialState):
            state._reset_state()
        GradientState._reset_state()
        train(folder, report, world_size, event if rank == crash_rank else None)

    return [in_child(lambda rank=rank: rank_of(rank)) for rank in range(world_size)]


def finish(world_size, folder, report):
    """Run to the end; the reports of the ranks."""
    assert [wait_for(child) for child in start(world_size, folder, report)] == [0] * world_size
    return [json.loads(report.with_suffix(f".{rank}").read_text()) for rank in range(world_size)]


def rows_of_steps(reports):
    """The rows of all ranks by step, without an order among the ranks."""
    return {step: sorted(row for report in reports for row in report["rows"][step]) for step in reports[0]["rows"]}


def end_of(child, limit):
    """The exit code of a child; it is killed after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    return wait_for(child)


@pytest.fixture(scope="module")
def lean():
    """Checkpoints without code and card, which are as many files again and nothing new."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CognexisPreTrainedModel, "_folder_writers", [])
        yield


def test_a_rank_killed_in_a_save_leaves_a_run_that_goes_on_on_two_ranks_and_on_one(lean, tmp_path):
    expected = finish(2, tmp_path / "whole", tmp_path / "whole.json")
    order = rows_of_steps(expected)
    assert expected[0]["weights"] == expected[1]["weights"] and len(order) == 12
    for kill in range(KILLS):
        rank = int(kill % 5 == 4)  # rank 0 writes nearly everything, rank 1 the state of its generators
        event = 0 if rank else 4 * (kill - kill // 5)
        folder, report = tmp_path / f"run-{kill}", tmp_path / f"run-{kill}.json"
        children = start(2, folder, report, rank, event)
        assert wait_for(children[rank]) == CRASHED, (rank, event)
        assert end_of(children[1 - rank], 30) not in (0, -signal.SIGKILL), (rank, event)
        newest = newest_verified(folder)
        assert newest is not None and newest.name == "checkpoint-3", (rank, event)
        if kill % 5 == 0:
            shutil.copytree(folder, tmp_path / "alone")
            alone = rows_of_steps(finish(1, tmp_path / "alone", tmp_path / "alone.json"))
            assert alone == {step: order[step] for step in alone} and len(alone) == 9
            shutil.rmtree(tmp_path / "alone")
        resumed = finish(2, folder, report)
        for place, (whole, part) in enumerate(zip(expected, resumed, strict=True)):
            rows = part.pop("rows")
            assert rows == {step: whole["rows"][step] for step in rows}
            others = ("log",) if place else ()  # the run's log is that of rank 0
            assert {k: v for k, v in part.items() if k not in others} == {
                k: v for k, v in whole.items() if k not in ("rows", *others)
            }
        shutil.rmtree(folder)
