"""Saving a folder: whatever event is the last one that happens, the old or the new content is there, whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cognexis.checkpoints.commit import finish_interrupted_save, staged_folder
from cognexis.checkpoints.json_file import write_json
from cognexis.checkpoints.manifest import MANIFEST_FILE, verify_folder, write_manifest
from cognexis.errors import CheckpointError
from tests.batteries.crash_points import crash_before_event

OLD = {"config.json": "{}", "metadata.json": '{"old": 1}', "model-00001-of-00002.safetensors": "a" * 500}
OLD |= {"model-00002-of-00002.safetensors": "b" * 500, "model.safetensors.index.json": "[]"}
NEW = {"config.json": '{"new": 1}', "metadata.json": "{}", "model.safetensors": "c" * 900}


def save(folder: Path, files: dict[str, str]) -> None:
    with staged_folder(folder) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)
        write_manifest(staging)


def weights_and_records(folder: Path) -> dict[str, str]:
    """The content of a checkpoint as its manifest names it; fails when they do not match."""
    found = verify_folder(folder)
    assert found.is_present and not found.faults, found
    names = [artifact["path"] for artifact in json.loads((folder / MANIFEST_FILE).read_text())["artifacts"]]
    return {name: (folder / name).read_text() for name in names}


def enumerate_crashes(folder: Path, prepare: Callable[[], None], action: Callable[[], None]) -> list[str]:
    """Crash ``action`` before each of its file-system events; return what was found after each crash."""
    outcomes = []
    for event in range(1000):
        prepare()
        if crash_before_event(event, action):
            return outcomes
        if not folder.exists():
            outcomes.append("nothing")
        else:
            finish_interrupted_save(folder)
            content = weights_and_records(folder)
            assert content in (OLD, NEW)
            outcomes.append("old" if content == OLD else "new")
            hidden = {path.name for path in folder.iterdir() if path.name.endswith(".safetensors")}
            assert outcomes[-1] == "old" or hidden == {"model.safetensors"}
        save(folder, NEW)  # what the crash left behind does not stand in the way
        assert weights_and_records(folder) == NEW
    raise AssertionError("the action never came to its end")


def test_every_crash_of_a_first_save_leaves_nothing_or_the_whole_folder(tmp_path):
    folder = tmp_path / "checkpoint"

    def prepare() -> None:
        subprocess.run(["rm", "-rf", folder], check=True)

    outcomes = enumerate_crashes(folder, prepare, lambda: save(folder, NEW))
    assert {"nothing", "new"} == set(outcomes) and len(outcomes) >= 15
    assert outcomes == sorted(outcomes, key=["nothing", "new"].index)  # one moment from which it counts


def test_every_crash_of_an_overwriting_save_leaves_the_old_or_the_new_content(tmp_path):
    folder = tmp_path / "checkpoint"

    def prepare() -> None:
        subprocess.run(["rm", "-rf", folder], check=True)
        save(folder, OLD)

    outcomes = enumerate_crashes(folder, prepare, lambda: save(folder, NEW))
    assert {"old", "new"} == set(outcomes) and len(outcomes) >= 20
    assert outcomes == sorted(outcomes, key=["old", "new"].index)
    assert outcomes.count("new") >= 8  # the files that move one by one are among the events


def test_every_crash_of_completing_a_save_can_be_completed_again(tmp_path):
    folder = tmp_path / "checkpoint"

    def prepare() -> None:
        subprocess.run(["rm", "-rf", folder], check=True)
        save(folder, OLD)
        committed = folder / ".saved"
        committed.mkdir()
        for name, text in NEW.items():
            (committed / name).write_text(text)
        write_manifest(committed)

    outcomes = enumerate_crashes(folder, prepare, lambda: finish_interrupted_save(folder))
    assert set(outcomes) == {"new"} and len(outcomes) >= 8


def test_without_the_commit_protocol_the_same_check_fails(tmp_path):
    folder = tmp_path / "checkpoint"

    def prepare() -> None:
        subprocess.run(["rm", "-rf", folder], check=True)
        save(folder, OLD)

    def write_in_place() -> None:
        for name, text in NEW.items():
            (folder / name).write_text(text)
        write_manifest(folder)

    with pytest.raises(AssertionError):
        enumerate_crashes(folder, prepare, write_in_place)


def test_other_files_of_an_existing_folder_stay(tmp_path):
    for name in ("README.md", "optimizer.pt", "notes/today.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    save(tmp_path, OLD)
    save(tmp_path, NEW)
    assert all((tmp_path / name).read_text() == name for name in ("README.md", "optimizer.pt", "notes/today.txt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*NEW, MANIFEST_FILE, "README.md", "optimizer.pt", "notes"]
    )


def save_half_and_fail(folder: Path) -> None:
    with staged_folder(folder) as staging:
        (staging / "config.json").write_text("half")
        raise ZeroDivisionError


def test_a_save_that_raises_changes_nothing(tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder, OLD)
    for target in (folder, tmp_path / "other"):
        with pytest.raises(ZeroDivisionError):
            save_half_and_fail(target)
    assert weights_and_records(folder) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_is_a_checkpoint_error_and_changes_nothing(tmp_path):
    save(tmp_path / "checkpoint", OLD)
    error = OSError(28, "No space left on device")
    with (
        pytest.raises(CheckpointError, match="cannot be saved: No space left"),
        staged_folder(tmp_path / "checkpoint"),
    ):
        raise error
    assert weights_and_records(tmp_path / "checkpoint") == OLD


def test_two_processes_cannot_save_at_once(tmp_path):
    folder = tmp_path / "checkpoint"
    save(folder, OLD)
    for target in (folder, tmp_path / "new"):
        with staged_folder(target) as staging:
            (staging / "first").write_text("x")
            with pytest.raises(CheckpointError, match=rf"process {os.getpid()} on .* is saving there"):
                save(target, NEW)
        assert (target / "first").read_text() == "x"


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    save(tmp_path, OLD)
    lock = tmp_path / ".saving.lock"
    import socket

    write_json(lock, {"pid": dead.pid, "host": socket.gethostname()})
    save(tmp_path, NEW)
    assert weights_and_records(tmp_path) == NEW and not lock.exists()


def test_the_lock_of_another_machine_is_respected(tmp_path):
    save(tmp_path, OLD)
    write_json(tmp_path / ".saving.lock", {"pid": 1, "host": "elsewhere.example"})
    with pytest.raises(CheckpointError, match=r"process 1 on elsewhere.example .* remove .*\.saving\.lock"):
        save(tmp_path, NEW)
    assert weights_and_records(tmp_path) == OLD


@pytest.mark.parametrize("name", ["with space", "ünïcode", "new\nline", "-dash", "a" * 200])
def test_any_folder_name_works(tmp_path, name):
    save(tmp_path / name, OLD)
    save(tmp_path / name, NEW)
    assert weights_and_records(tmp_path / name) == NEW


def test_places_that_are_no_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"file: is a file"):
        save(tmp_path / "file", NEW)
    with pytest.raises(CheckpointError, match="points nowhere"):
        save(tmp_path / "dangling", NEW)
    with pytest.raises(CheckpointError, match="cannot be saved"):
        save(tmp_path / "file" / "below", NEW)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", NEW)
    assert weights_and_records(tmp_path / "real") == NEW and (tmp_path / "link").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="drops its rights, which only root can")
def test_a_folder_without_permission_is_refused(tmp_path):
    save(tmp_path / "checkpoint", OLD)
    program = f"""
import os, sys
from cognexis.checkpoints.commit import staged_folder
os.setuid(65534)
try:
    with staged_folder({str(tmp_path / "checkpoint")!r}):
        pass
except Exception as error:
    print(type(error).__name__, error)
"""
    os.chmod(tmp_path, 0o755)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if "Permission denied" not in result.stdout:
        pytest.skip(f"the interpreter itself is out of reach without rights: {result.stderr[-200:]}")
    assert result.stdout.startswith("CheckpointError")
    assert weights_and_records(tmp_path / "checkpoint") == OLD
