"""What stays of the checkpoints of a run; the folders are small ones with the files that count."""

import shutil

import pytest

from cognexis.checkpoints.json_file import write_json
from cognexis.checkpoints.manifest import write_manifest
from cognexis.errors import InvalidConfigError
from cognexis.training.checkpointing.retention import Retention, checkpoints_of, newest_verified, prune
from cognexis.training.checkpointing.training_state import TrainingState, write_training_state
from tests.batteries.crash_points import crash_before_event


def make(run, step, metric=None, damaged=False):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("config.json", "metadata.json", "trainer_state.json"):
        write_json(folder / name, {})
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(bytes([step]) * 64)
    write_training_state(folder, TrainingState(step=step, world_size=1, metric=metric))
    write_manifest(folder)
    if damaged:
        (folder / "optimizer.pt").write_bytes(b"x" * 64)
    return folder


def steps(run):
    return sorted(int(path.name.split("-")[1]) for path in checkpoints_of(run))


def test_newest_and_best_stay(tmp_path):
    for step, metric in ((1, 0.5), (2, 0.1), (3, None), (4, 0.3), (5, 0.9)):
        make(tmp_path, step, metric)
    removed = prune(tmp_path, Retention(keep_last=1, keep_best=2))
    assert steps(tmp_path) == [2, 4, 5] and len(removed) == 2
    prune(tmp_path, Retention(keep_last=1, keep_best=1, greater_is_better=True))
    assert steps(tmp_path) == [5]


def test_all_stay_without_a_number_and_protected_ones_in_any_case(tmp_path):
    folders = [make(tmp_path, step) for step in (1, 2, 3)]
    assert prune(tmp_path, Retention()) == []
    prune(tmp_path, Retention(keep_last=1), protected=[folders[0]])
    assert steps(tmp_path) == [1, 3]


def test_damaged_checkpoints_are_never_removed_and_never_count(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step, damaged=step > 2)
    prune(tmp_path, Retention(keep_last=1))
    assert steps(tmp_path) == [2, 3, 4]  # 2 is the last good one
    assert newest_verified(tmp_path) == tmp_path / "checkpoint-2"


def test_other_folders_and_links_are_left_alone(tmp_path):
    make(tmp_path, 1)
    make(tmp_path, 2)
    for name in ("checkpoint-x", "checkpoint-3.damaged-0", "notes"):
        (tmp_path / name).mkdir()
    prune(tmp_path, Retention(keep_last=1))
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-2",
        "checkpoint-x",
        "checkpoint-3.damaged-0",
        "notes",
    }


@pytest.mark.parametrize("keep", [-1, 1.0, True])
def test_number_that_is_no_count_is_refused(keep):
    with pytest.raises(InvalidConfigError, match="keep_last="):
        Retention(keep_last=keep)


def test_every_crash_of_a_removal_leaves_whole_checkpoints_and_the_next_removal_ends_it(tmp_path):
    template, run = tmp_path / "template", tmp_path / "run"
    for step in (1, 2, 3):
        make(template, step)
    outcomes = []
    for event in range(200):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        finished = crash_before_event(event, lambda: prune(run, Retention(keep_last=1)))
        if finished:
            break
        assert newest_verified(run) == run / "checkpoint-3"
        outcomes.append(steps(run))
        prune(run, Retention(keep_last=1))
        assert [path.name for path in run.iterdir()] == ["checkpoint-3"]
    assert outcomes[0] == [1, 2, 3] and outcomes[-1] == [3] and len(outcomes) > 10
