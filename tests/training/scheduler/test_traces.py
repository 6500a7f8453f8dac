"""Depth traces: measured against one fixed-depth run per loop, and what is written."""

import json
from itertools import pairwise

import datasets
import pytest
import torch
from torch import nn

from cognexis.errors import InvalidConfigError
from cognexis.looping.value_head import attach_value_head
from cognexis.training.scheduler.depths import run_depths
from cognexis.training.scheduler.rows import DataRow, make_batch
from cognexis.training.scheduler.traces import COLUMNS, SIGNALS, collect_traces, trace_columns, write_traces
from tests.batteries.tiny import tiny_config, tiny_model

L = 4
ROWS = (
    DataRow("line-1", (5, 6, 7, 8, 9, 10, 11), (6, 7, -100, 9, 10, 11, -100)),
    DataRow("line-2", (12, 13, 14), (13, 14, -100), "short"),
    DataRow("line-3", (20, 21, 22, 23, 24), (21, 22, 23, 24, -100)),
)
HEAD = {"kind": "token", "bottleneck_size": 8, "features": ["relative_delta"]}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def traces(model):
    return collect_traces(model, ROWS, L, batch_size=2)


def test_losses_and_scores_are_those_of_a_fixed_run_of_each_depth(model, traces):
    for index, row in enumerate(ROWS):
        targets = torch.tensor(row.targets)
        for loop in range(1, L + 1):
            with torch.no_grad():
                logits = model(torch.tensor([row.input_ids]), num_loops=loop).logits[0]
            losses = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
            length = len(row.input_ids)
            torch.testing.assert_close(traces.losses[index, :length, loop - 1], losses, rtol=1e-4, atol=1e-5)
            right = (logits.argmax(-1) == targets).float()
            assert torch.equal(traces.scores[index, :length, loop - 1], right)
            p = logits.softmax(-1)
            top = p.topk(2).values
            expected = {"confidence": top[:, 0], "margin": top[:, 0] - top[:, 1], "entropy": -(p * p.log()).sum(-1)}
            for name, values in expected.items():
                got = traces.signals[name][index, :length, loop - 1]
                torch.testing.assert_close(got, values, rtol=1e-3, atol=1e-5)
    assert (traces.losses[~traces.has_target] == 0).all() and traces.has_target.sum() == 11


@pytest.mark.parametrize("start", ["h0", "random"])
def test_changes_of_the_state_start_from_where_the_loops_start(start):
    model = tiny_model(tiny_config(recurrent_init=start, state_retention="all"))
    batch = make_batch([ROWS[0]], 0)
    measured = []
    run_depths(model, batch, L, measured.append)
    with torch.no_grad():
        states = model(batch.input_ids, num_loops=L).loop_states
    first = []
    handle = model.model.recurrent.blocks[0].register_forward_pre_hook(lambda _, args: first.append(args[0]))
    with torch.no_grad():
        model.config.input_injection = "none"  # so that the first block sees the start itself
        model(batch.input_ids, num_loops=1)
    handle.remove()
    for before, after, found in zip([first[0], *states], states, measured, strict=False):
        torch.testing.assert_close(found.state, after)
        delta = (after - before).norm(dim=-1)
        torch.testing.assert_close(found.signals["hidden_delta"], delta)
        torch.testing.assert_close(found.signals["relative_delta"], delta / before.norm(dim=-1))
        torch.testing.assert_close(found.signals["state_norm"], after.norm(dim=-1))
    assert len(measured) == L and not model.training


def test_gains_are_adjacent_losses_and_best_gains_look_ahead(traces):
    torch.testing.assert_close(traces.gains, traces.losses[..., :-1] - traces.losses[..., 1:])
    for loop in range(L - 1):
        best = traces.losses[..., loop] - traces.losses[..., loop + 1 :].amin(-1)
        torch.testing.assert_close(traces.best_gains[..., loop], best)


def test_batching_and_padding_change_nothing(model, traces):
    alone = [collect_traces(model, [row], L) for row in ROWS]
    for index, single in enumerate(alone):
        length = len(ROWS[index].input_ids)
        torch.testing.assert_close(traces.losses[index, :length], single.losses[0], rtol=1e-4, atol=1e-5)
        for name in SIGNALS:
            got, expected = traces.signals[name][index, :length], single.signals[name][0]
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        assert traces.is_real[index].sum() == length


def test_head_values_are_kept_and_calibrated(model):
    head = attach_value_head(tiny_model(), HEAD)
    traces = collect_traces(model, ROWS, L, head=head)
    measured = []
    run_depths(model, make_batch([ROWS[1]], 0), L, measured.append)
    expected = torch.stack([head(m.state, m.loop, None, m.signals) for m in measured], dim=-1)
    torch.testing.assert_close(traces.values[1, :3], expected[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(traces.predictions(head), traces.values)
    head.set_calibration({"method": "linear", "scale": 2.0, "offset": 1.0})
    torch.testing.assert_close(traces.predictions(head), (2 * traces.values + 1) * traces.is_real[..., None])
    with pytest.raises(InvalidConfigError, match="no value head"):
        collect_traces(model, ROWS, 2).predictions(head)


def test_both_files_hold_the_same_lines_with_gains_that_fit_their_neighbours(model, traces, tmp_path):
    manifest = write_traces(tmp_path / "out", traces, {"seed": 3, "checkpoint": "c", "data": "d"})
    lines = [json.loads(line) for line in (tmp_path / "out" / "traces.jsonl").read_text().splitlines()]
    assert all(list(line) == list(COLUMNS) for line in lines) and len(lines) == manifest["num_lines"] == 11 * L
    for line, after in pairwise(lines):
        if line["loop"] == L:
            assert line["gain"] is None and line["best_gain"] is None and after["loop"] == 1
        else:
            assert after["loop"] == line["loop"] + 1
            assert (after["request_id"], after["token"]) == (line["request_id"], line["token"])
            assert line["gain"] == pytest.approx(line["loss"] - after["loss"], abs=1e-5)
            assert line["best_gain"] >= line["gain"]
    assert {(line["request_id"], line["task"]) for line in lines} == {(row.name, row.task) for row in ROWS}
    assert all((line["prediction_change"] is None) == (line["loop"] == 1) for line in lines)
    assert all(line["predicted_gain"] is None for line in lines)
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert stored == manifest and stored["seed"] == 3 and stored["num_loops"] == L and stored["num_rows"] == 3
    table = datasets.Dataset.from_parquet(str(tmp_path / "out" / "traces.parquet"), cache_dir=str(tmp_path / "cache"))
    assert table.column_names == list(COLUMNS)
    for got, line in zip(table, lines, strict=True):
        for name, value in line.items():
            assert got[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


def test_columns_name_the_prediction_of_the_head(model):
    head = attach_value_head(tiny_model(), HEAD)
    traces = collect_traces(model, ROWS, 2, head=head)
    got = torch.tensor(trace_columns(traces, head)["predicted_gain"])
    torch.testing.assert_close(got, traces.values[traces.has_target].flatten())


def test_depth_outside_the_configuration_is_refused(model):
    for depth in (1, L + 1):
        with pytest.raises(InvalidConfigError, match=f"max_loops={depth}: must lie between 2 and .*max_loops=4"):
            collect_traces(model, ROWS, depth)
