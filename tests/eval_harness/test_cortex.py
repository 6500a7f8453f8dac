"""The command line of the evaluation, with a plain GRU in place of the stacks."""

import json
import subprocess
import sys

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from cognexis.eval_harness.cortex import main
from cognexis.eval_harness.cortex_stacks import ALIASES, STACKS, StackRecipe

SMALL = ["--num-samples", "60", "--epochs", "2", "--stop-at", "2", "--d-hidden", "4", "--no-plot"]


class GRUStack(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x, state=None, *, resets=None):
        y, h = self.gru(x, None if state is None else state["h"][None])
        return y, TensorDict({"h": h[0]}, batch_size=[len(x)])


class Failing(nn.Module):
    def __init__(self, width):
        super().__init__()
        raise RuntimeError("no such kernel")


@pytest.fixture
def gru():
    """The registered stacks, replaced by one that works; afterwards they are back in their order."""
    registered = dict(STACKS)
    STACKS.clear()
    STACKS["gru"] = StackRecipe("a GRU", GRUStack, width=16)
    yield
    STACKS.clear()
    STACKS.update(registered)


def read_rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("gru")
def test_row_table_and_summaries_are_written(tmp_path, capsys):
    assert main(["--task", "majority", "--stack", "gru", "--set", "length=10", "--out", str(tmp_path), *SMALL]) == 0
    (row,) = read_rows(tmp_path)
    assert (row["status"], row["width"], row["difficulty"]["length"], len(row["history"])) == ("done", 4, 10, 2)
    assert json.loads((tmp_path / "summary.json").read_text()) == [row]
    printed = capsys.readouterr()
    heading, _, line = printed.out.splitlines()
    assert heading.startswith("task      stack  parameters  test accuracy") and line.startswith("majority  gru")
    assert "| majority | gru |" in (tmp_path / "summary.md").read_text()
    assert "epoch 2 of 2" in printed.err and "test accuracy" in printed.err


@pytest.mark.usefixtures("gru")
def test_known_rows_are_not_computed_again_and_a_cut_line_is_left_out(tmp_path, capsys):
    command = ["--task", "majority", "--stack", "gru", "--set", "length=10", "--out", str(tmp_path), *SMALL]
    main(command)
    (row,) = read_rows(tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": "cut of')
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == [row]
    assert "line 2 is incomplete" in printed.err and "taken from" in printed.err
    assert main([*command, "--seed", "3"]) == 0
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])["settings"]["seed"] == 3
    assert len(json.loads((tmp_path / "summary.json").read_text())) == 2
    assert main([*command, "--rerun"]) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4
    assert len(json.loads((tmp_path / "summary.json").read_text())) == 2


@pytest.mark.usefixtures("gru")
def test_all_stacks_run_although_one_fails_and_one_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(STACKS, "failing", StackRecipe("fails", Failing))
    monkeypatch.setitem(STACKS, "absent", StackRecipe("absent", GRUStack, missing=lambda: "no weights"))
    monkeypatch.setitem(STACKS, "last", StackRecipe("works", GRUStack))
    command = ["--task", "dyck", "--set", "num_pairs=6", "--out", str(tmp_path), *SMALL]
    assert main([*command, "--stack", "all"]) == 1
    assert [row["status"] for row in read_rows(tmp_path)] == ["done", "failed", "done"]
    printed = capsys.readouterr()
    assert "failing: RuntimeError: no such kernel" in printed.err and "absent: left out: no weights" in printed.err
    assert [line.split()[1] for line in printed.out.splitlines()[2:]] == ["gru", "failing", "absent", "last"]
    assert main([*command, "--stack", "absent"]) == 2
    assert "error: stack='absent': no weights" in capsys.readouterr().err


@pytest.mark.usefixtures("gru")
def test_options_reach_the_training(tmp_path):
    options = "--chunk-size 4 --axon-lr-mult 2 --axon-weight-decay 0.1 --rtu-disable-traces-last-chunk --lr 0.01"
    more = "--reset-state-before-last-chunk --axons-parity-probe 1 --batch-size 7 --max-minutes 5 --deterministic"
    command = ["--task", "majority", "--stack", "gru", "--set", "length=10", "--out", str(tmp_path), *SMALL]
    assert main([*command, *options.split(), *more.split()]) == 0
    assert not torch.are_deterministic_algorithms_enabled() or torch.get_deterministic_debug_mode() == 2
    (row,) = read_rows(tmp_path)
    expected = {
        "chunk_size": 4,
        "axon_lr_mult": 2.0,
        "axon_weight_decay": 0.1,
        "rtu_disable_traces_last_chunk": True,
        "reset_state_before_last_chunk": True,
        "axons_parity_probe": 1,
        "batch_size": 7,
        "lr": 0.01,
        "max_seconds": 300.0,
        "device": row["settings"]["device"],
    }
    assert expected.items() <= row["settings"].items() and row["deterministic"] and len(row["parity"]) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task dick --stack slstm", "task='dick': must be one of delayed_recall"),
        ("--task dyck --stack lstm_up", "stack='lstm_up': must be one of slstm, mlstm"),
        ("--stack slstm", "--task is missing; --list shows the choices"),
        ("--task dyck", "--stack is missing"),
        ("--task dyck --stack slstm --epochs 0", "epochs=0: must be at least 1"),
        ("--task dyck --stack slstm --num-samples 5", "num_samples=5: must be at least 10"),
        ("--task dyck --stack slstm --set pairs=5", "--set pairs: task dyck knows num_pairs"),
        ("--task dyck --stack slstm --set num_pairs", "--set num_pairs: must be NAME=NUMBER"),
        ("--task dyck --stack slstm --set num_pairs=0", "num_pairs=0: must be at least 1"),
        ("--task dyck --stack slstm --axons-parity-probe 5", "axons_parity_probe=5: needs chunk_size"),
        ("--task dyck --stack slstm --device cuda:99", "device='cuda:99'"),
        ("--task dyck --stack slstm --device tpu9", "device='tpu9'"),
        ("--task dyck --stack slstm --d-hidden 0", "d_hidden=0: must be at least 1"),
        ("--task dyck --stack slstm --max-minutes -1", "max_seconds=-60.0: must be above 0"),
    ],
)
def test_wrong_settings_end_with_exit_code_2_and_one_line(arguments, message, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main([*arguments.split(), "--out", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert not printed.out and not folder.exists()


def test_unknown_flag_ends_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--task", "dyck", "--stak", "all"])
    assert caught.value.code == 2 and "unrecognized arguments: --stak" in capsys.readouterr().err


def test_list_names_every_task_and_stack(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ["delayed_recall", "assoc_recall_fast", *STACKS, *ALIASES])


def test_registered_stacks_are_those_that_users_know():
    names = "slstm mlstm slstm_axon mlstm_axon axons cortex_auto cortex_auto_compiled cortex_auto_axon smollm"
    assert set(names.split()) == set(STACKS)
    assert ALIASES == {"slstm_postup": "slstm", "mlstm_preup": "mlstm"}


@pytest.mark.slow
def test_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "cognexis.eval_harness.cortex", "--task", "dyck", "--stack", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2 and "must be one of slstm, mlstm" in done.stderr and "Traceback" not in done.stderr


def test_interrupt_has_its_own_exit_code(gru, monkeypatch, tmp_path, capsys):
    def interrupted(job, splits):
        raise KeyboardInterrupt

    monkeypatch.setattr("cognexis.eval_harness.cortex.compute", interrupted)
    assert main(["--task", "majority", "--stack", "gru", "--out", str(tmp_path), *SMALL]) == 130
    assert "the same command goes on" in capsys.readouterr().err
