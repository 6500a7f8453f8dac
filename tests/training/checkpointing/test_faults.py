"""Ending a run at any moment, by crashes, failing system calls and signals that cannot be caught.

How much is tried is set by COGNEXIS_FAULTS: "ci" (the default) or "nightly".
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from cognexis.checkpoints.json_file import sync
from cognexis.errors import CheckpointError
from cognexis.modeling_cognexis import CognexisPreTrainedModel
from cognexis.training.checkpointing.retention import Retention, checkpoints_of, newest_verified
from cognexis.training.checkpointing.training_state import resume_faults
from tests.batteries.crash_points import crash_before_event
from tests.batteries.interrupted_training import in_child, small_trainer, train_to_the_end, wait_for

pytestmark = pytest.mark.slow

IS_NIGHTLY = os.environ.get("COGNEXIS_FAULTS", "ci") == "nightly"
KILLS = 200 if IS_NIGHTLY else 40
INJECTIONS = 600 if IS_NIGHTLY else 150
CALLS = ("openat", "write", "fsync", "rename", "unlink")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer after two steps, with a checkpoint of the first in its folder; everything is imported by then."""
    torch.set_deterministic_debug_mode("default")
    folder = tmp_path_factory.mktemp("trained")
    trainer = small_trainer(folder, max_steps=2, save_strategy="no", retention=Retention(keep_last=1))
    trainer.train()
    trainer.state.global_step = 1
    trainer._save_checkpoint(trainer.model, None)
    trainer.state.global_step = 2
    return trainer


@pytest.fixture
def run(trained, tmp_path):
    """A folder with that checkpoint, which the trainer saves into from now on."""
    shutil.copytree(trained.args.output_dir, tmp_path / "run")
    trained.args.output_dir = str(tmp_path / "run")
    yield tmp_path / "run"
    trained.args.output_dir = str(next(tmp_path.parent.glob("trained*"), tmp_path))


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["second save", "over the same step"])
def test_every_crash_point_of_a_save_leaves_a_verified_checkpoint(trained, run, tmp_path, kind):
    if kind == "over the same step":
        trained._save_checkpoint(trained.model, None)
    template = tmp_path / "template"
    shutil.copytree(run, template)
    old = content(run / "checkpoint-1") if (run / "checkpoint-1").exists() else None
    outcomes = []
    for event in range(2000):
        shutil.rmtree(run)
        shutil.copytree(template, run)
        if crash_before_event(event, lambda: trained._save_checkpoint(trained.model, None)):
            break
        newest = newest_verified(run)
        assert newest is not None, event
        others = [path for path in checkpoints_of(run) if path != newest]
        assert not any(resume_faults(path) for path in others), event
        if newest.name == "checkpoint-1":
            assert content(newest) == old
        outcomes.append(newest.name)
        if event % 10 == 0:  # what the crash left behind does not stand in the way
            trained._save_checkpoint(trained.model, None)
            assert newest_verified(run) == run / "checkpoint-2"
    assert len(outcomes) > 60
    print(f"{kind}: {len(outcomes)} crash points, {outcomes.count('checkpoint-1')} of them before the commit")
    if kind == "second save":
        assert set(outcomes) == {"checkpoint-1", "checkpoint-2"} and outcomes == sorted(outcomes)


def test_first_save_leaves_nothing_or_everything_at_every_crash_point(trained, run):
    seen = set()
    for event in range(0, 2000, 3):
        shutil.rmtree(run)
        run.mkdir()
        if crash_before_event(event, lambda: trained._save_checkpoint(trained.model, None)):
            break
        assert [path.name for path in checkpoints_of(run)] in ([], ["checkpoint-2"])
        seen.add(newest_verified(run))
    assert seen == {None, run / "checkpoint-2"}


def traced_save(trainer, injection):
    """Save in a child under strace; returns its exit code and, without an injection, the calls it made."""
    ready, begin = os.pipe(), os.pipe()

    def save():
        os.write(ready[1], b"1")
        os.read(begin[0], 1)
        try:
            trainer._save_checkpoint(trainer.model, None)
        except CheckpointError:
            raise SystemExit(3) from None

    child = in_child(save)
    os.read(ready[0], 1)
    log = f"{trainer.args.output_dir}.strace"
    options = ["-e", f"trace={','.join(CALLS)}", *(["-e", f"inject={injection}"] if injection else [])]
    tracer = subprocess.Popen(["strace", "-f", "-q", "-o", log, *options, "-p", str(child)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not re.search(r"TracerPid:\s+[1-9]", Path(f"/proc/{child}/status").read_text()):
        assert time.monotonic() < deadline and tracer.poll() is None, "strace did not attach"
        time.sleep(0.005)
    os.write(begin[1], b"1")
    code = wait_for(child)
    tracer.wait()
    for end in (*ready, *begin):
        os.close(end)
    lines = Path(log).read_text().splitlines()
    return code, [found[1] for line in lines if (found := re.search(r"\b(\w+)\(", line))]


def test_failing_system_calls_of_a_save_leave_the_old_checkpoint_intact(trained, run, tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    template = tmp_path / "template"
    shutil.copytree(run, template)
    old = content(run / "checkpoint-1")
    try:
        code, calls = traced_save(trained, None)
    except AssertionError:
        pytest.skip("strace may not trace here")
    assert code == 0
    totals = {call: calls.count(call) for call in CALLS}
    assert all(totals[call] for call in ("openat", "write", "fsync", "rename"))
    faults = [
        (call, kind) for call in CALLS if totals[call] for kind in ("error=EIO", "error=ENOSPC", "signal=SIGKILL")
    ]
    each = -(-INJECTIONS // len(faults))
    tried = {"saved": 0, "refused": 0, "killed": 0}
    for call, kind in faults:
        for number in range(each):
            place = 1 + number * totals[call] // each
            shutil.rmtree(run)
            shutil.copytree(template, run)
            code, _ = traced_save(trained, f"{call}:{kind}:when={place}")
            where = (call, kind, place, code)
            assert code in (0, 3, -signal.SIGKILL), where
            tried[{0: "saved", 3: "refused"}.get(code, "killed")] += 1
            newest = newest_verified(run)
            assert newest is not None, where
            if newest.name == "checkpoint-1":
                assert content(newest) == old, where
            assert code != 0 or newest.name == "checkpoint-2", where
    print(f"{sum(tried.values())} injections into {totals}: {tried}")
    assert sum(tried.values()) >= INJECTIONS and min(tried.values()) > 0
    trained._save_checkpoint(trained.model, None)
    assert newest_verified(run) == run / "checkpoint-2"


@pytest.fixture(scope="module")
def lean():
    """Checkpoints without code and card, which are as many files again and nothing new."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CognexisPreTrainedModel, "_folder_writers", [])
        yield


@pytest.fixture(scope="module")
def expected(trained, lean, tmp_path_factory):
    """Fingerprint and duration of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("expected")
    start = time.monotonic()
    assert wait_for(in_child(lambda: train_to_the_end(folder / "run", folder / "report.json"))) == 0
    return json.loads((folder / "report.json").read_text()), time.monotonic() - start


def test_runs_killed_at_random_end_like_uninterrupted_ones(expected, tmp_path):
    fingerprint, seconds = expected
    generator = random.Random(5)
    kills = runs = 0
    while kills < KILLS:
        folder, report = tmp_path / f"run-{runs}", tmp_path / f"report-{runs}.json"
        wanted = min(5, KILLS - kills)
        while not report.exists():
            child = in_child(lambda: train_to_the_end(folder, report))  # noqa: B023  (the child starts at once)
            if wanted:
                time.sleep(generator.uniform(0.05, 0.9) * seconds)
                os.kill(child, signal.SIGKILL)
            code = wait_for(child)
            assert code in (0, -signal.SIGKILL), code
            kills += code != 0
            wanted -= code != 0 and wanted > 0
            if folder.exists() and checkpoints_of(folder):
                assert newest_verified(folder) is not None
        assert json.loads(report.read_text()) == fingerprint
        shutil.rmtree(folder)
        runs += 1
    print(f"{kills} kills in {runs} runs, each ends like the uninterrupted one")


def test_run_that_is_interrupted_twenty_five_times_ends_like_an_uninterrupted_one(trained, lean, tmp_path):
    changes = {"max_steps": 27, "save_steps": 100, "logging_steps": 3}
    assert wait_for(in_child(lambda: train_to_the_end(tmp_path / "a", tmp_path / "a.json", **changes))) == 0
    for step in range(1, 26):

        def part(step=step):
            torch.manual_seed(step)  # nothing of the process may matter
            trainer = small_trainer(tmp_path / "b", **changes)
            trainer.add_callback(_SignalAt(step))
            trainer.train("auto")
            assert trainer.stop_signal == signal.SIGTERM and trainer.state.global_step == step
            raise SystemExit(143)

        assert wait_for(in_child(part)) == 143
    assert wait_for(in_child(lambda: train_to_the_end(tmp_path / "b", tmp_path / "b.json", **changes))) == 0
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads((tmp_path / "a.json").read_text())


def _SignalAt(step):
    from transformers import TrainerCallback

    class SignalAt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    return SignalAt()


def test_harness_notices_a_save_that_is_not_committed_in_one_step(trained, run):
    """The same enumeration fails when files are written in place, so it can fail at all."""
    before = (run / "checkpoint-1" / "optimizer.pt").read_bytes()

    def write_in_place():
        with open(run / "checkpoint-1" / "optimizer.pt", "wb") as file:
            file.write(before[::-1])
        sync(run)

    assert not crash_before_event(1, write_in_place)
    assert newest_verified(run) is None
