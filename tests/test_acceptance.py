"""The acceptance script: it passes here, and it says so when something does not hold."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "acceptance.py"


@pytest.fixture(scope="module")
def acceptance():
    spec = importlib.util.spec_from_file_location("acceptance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["acceptance"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["acceptance"]


@pytest.mark.slow
def test_everything_holds(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.startswith("[ok] ") for line in lines) == 6 and lines[-1] == "6 of 6 checks hold"
    assert (tmp_path / "evaluation" / "rows.jsonl").is_file()


def fail(place):
    raise ValueError("too\nlittle")


def test_failed_check_is_named_and_the_others_are_made(acceptance, tmp_path, capsys):
    checks = [("first", lambda place: "one"), ("second", fail), ("third", lambda place: "three")]
    assert acceptance.run_checks(acceptance.Place(tmp_path), checks) == 1
    assert capsys.readouterr().out.splitlines() == [
        "[ok]     first: one",
        "[FAILED] second: ValueError: too little",
        "[ok]     third: three",
    ]


def test_without_a_model_nothing_holds(acceptance, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(acceptance, "CHECKS", [("first", fail), ("second", fail)])
    monkeypatch.setattr(acceptance.run_checks, "__defaults__", (acceptance.CHECKS,))
    assert acceptance.main(["--out", str(tmp_path)]) == 1
    assert "[--]     second: left out" in capsys.readouterr().out
