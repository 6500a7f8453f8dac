"""The commit of a checkout, and the memory of a run."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from cognexis.eval_harness.runner import memory
from cognexis.eval_harness.runner.memory import PeakMemory
from cognexis.eval_harness.runner.provenance import git_commit, versions


def git(folder, *words):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    done = subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_that_of_the_checkout_that_tracks_the_package(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    assert git_commit(package) is None
    git(tmp_path, "init", "-q")
    assert git_commit(package) is None  # an installed package below somebody's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(package) == commit and len(commit) == 40
    (package / "b.py").write_text("1")
    assert git_commit(package) == commit
    (package / "a.py").write_text("2")
    assert git_commit(package) == f"{commit}+changes"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None
    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"] == torch.__version__


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel keeps the peak")
def test_peak_is_what_was_held_at_once():
    with PeakMemory(torch.device("cpu")) as small:
        pass
    with PeakMemory(torch.device("cpu")) as large:
        for _ in range(3):
            held = np.ones(2**23)  # 64 MiB
            del held
    assert small.bytes is not None and large.bytes is not None
    assert 60 * 2**20 < large.bytes < 120 * 2**20 and small.bytes < 16 * 2**20


def test_peak_is_unknown_where_the_system_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROC", tmp_path / "none")
    with PeakMemory(torch.device("cpu")) as found:
        pass
    assert found.bytes is None
