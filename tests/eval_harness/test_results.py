"""Result rows: strict, written once, whole after a kill; their summary and table."""

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from cognexis.errors import BackendError, InvalidConfigError
from cognexis.eval_harness.metrics.depth_results import DepthOptions
from cognexis.eval_harness.result_files import RowFile, read_rows, row_line
from cognexis.eval_harness.result_tables import CSV_COLUMNS, csv_text, curves, summary, write_csv, write_summary
from cognexis.eval_harness.results import result_row

ROW = {
    "checkpoint": "runs/model",
    "tokenizer_checksum": "sha256:" + "0" * 64,
    "dataset": "held-out",
    "split": "validation",
    "task_version": "1",
    "prompt_format": "none",
    "decoding": {},
    "loop_mode": "fixed",
    "loop_count": 1,
    "metric_name": "accuracy",
    "metric_value": 0.5,
    "metric_direction": "higher_is_better",
    "num_examples": 20,
    "seed": 0,
    "hardware": "cpu",
    "dtype": "float32",
}
DIAGNOSTICS = {"average_loops_used": 2.0, "loop_count_histogram": [0, 1, 2, 1], "halt_reasons": {"confidence": 4}}


def row(**changes):
    return result_row(ROW | changes)


def measured():
    points = ((1, 0.50, 10.0), (2, 0.70, 20.0), (4, 0.72, 40.0), (8, 0.69, 80.0))
    return [row(loop_count=depth, metric_value=score, flops_mean=cost) for depth, score, cost in points]


# ---- rows ----


def test_row_survives_the_way_through_a_file(tmp_path):
    full = row(
        decoding={"temperature": 0.0},
        scheduler_diagnostics=DIAGNOSTICS,
        stage_flops={"prelude": 1.0, "recurrent": 2.0, "coda": 3.0, "head": 4.0},
        hidden_norms=[1.0, None, 2.5],
        nonstandard_features=["no_coda"],
        versions={"torch": "2"},
        extrapolated=True,
    )
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row_line(full))
    assert read_rows(path) == [full]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "checkpoint=''"),
        ({"loop_count": 0}, "loop_count=0"),
        ({"loop_count": True}, "loop_count=True"),
        ({"metric_value": math.nan}, "metric_value=nan"),
        ({"latency_ms_mean": math.inf}, "latency_ms_mean=inf"),
        ({"flops_mean": -1.0}, "flops_mean=-1.0"),
        ({"loop_mode": "adaptive"}, "loop_mode='adaptive'"),
        ({"metric_direction": "up"}, "metric_direction='up'"),
        ({"acuracy": 1.0}, "acuracy=1.0"),
        ({"status": "failed"}, "needs a detail"),
        ({"hidden_norms": [math.nan]}, "hidden_norms"),
        ({"scheduler_diagnostics": {**DIAGNOSTICS, "budget_violation_count": -1}}, "budget_violation_count"),
    ],
)
def test_row_that_says_something_impossible_is_refused(changes, message):
    with pytest.raises(InvalidConfigError, match=message):
        row(**changes)


def test_every_missing_field_is_named():
    with pytest.raises(InvalidConfigError) as caught:
        result_row({})
    assert {fault.path for fault in caught.value.faults} >= {"checkpoint", "dataset", "seed", "loop_count"}


def test_identity_leaves_out_what_was_measured():
    assert row().identity == row(metric_value=0.9, latency_ms_mean=3.0).identity
    for change in ({"seed": 1}, {"loop_count": 2}, {"split": "test"}, {"decoding": {"top_p": 0.9}}, {"dtype": "x"}):
        assert row(**change).identity != row().identity
    assert row(loop_count=2).curve == row().curve != row(seed=1).curve


# ---- files ----


def test_row_is_written_once(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with RowFile(path) as file:
        assert file.append(row()) and not file.append(row(metric_value=0.9))
        assert file.has(row().identity) and not file.has(row(seed=1).identity)
    with RowFile(path) as file:
        assert not file.append(row()) and file.append(row(seed=1))
    assert read_rows(path) == [row(), row(seed=1)]


def test_line_that_was_cut_off_is_measured_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second = row_line(row()), row_line(row(seed=1))
    for cut in (*range(0, len(second), 97), len(second) - 1):
        path.write_bytes(first + second[:cut])
        assert read_rows(path) == [row()]
        with RowFile(path) as file:
            assert not file.has(row(seed=1).identity)
            file.append(row(seed=1))
        assert path.read_bytes() == first + second


_WRITER = """
import sys
from pathlib import Path
from cognexis.eval_harness.result_files import RowFile
from cognexis.eval_harness.results import result_row
import json
with RowFile(Path(sys.argv[1])) as file:
    print("open", flush=True)
    for seed in range(100000):
        file.append(result_row(json.loads(sys.argv[2]) | {"seed": seed}))
"""


def test_killed_evaluation_leaves_whole_rows_and_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    for _ in range(3):
        before = len(read_rows(path)) if path.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), json.dumps(ROW)], stdout=subprocess.PIPE, env=os.environ
        )
        assert process.stdout.readline() == b"open\n"
        while path.read_bytes().count(b"\n") < before + 20:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert [found.seed for found in read_rows(path)] == [*range(len(read_rows(path)))]
        assert len(read_rows(path)) >= before + 20


def test_two_evaluations_do_not_share_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path), pytest.raises(BackendError, match="another evaluation writes"):
        RowFile(path)
    with RowFile(path):
        pass


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not valid JSON"),
        (b"[]", "line 2: must be an object"),
        (b'{"seed": NaN}', "line 2: the number NaN is not finite"),
        (b'{"seed": 1, "seed": 2}', "line 2: the key 'seed' is given twice"),
        (b'{"seed": 1}', "line 2: result row: checkpoint"),
        (row_line(result_row(ROW)).strip(), "line 2: measures the same"),
        (b"\xff", "line 2: not UTF-8"),
    ],
)
def test_damaged_line_is_an_error_with_its_number(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row_line(row()) + line + b"\n")
    before = path.read_bytes()
    for opened in (read_rows, RowFile):
        with pytest.raises(InvalidConfigError, match=message):
            opened(path)
    assert path.read_bytes() == before


# ---- summary and table ----


def test_summary_of_two_rows():
    rows = [
        row(metric_value=0.5, latency_ms_mean=10.0, flops_mean=100.0),
        row(loop_count=2, metric_value=0.7, latency_ms_mean=20.0, flops_mean=200.0),
    ]
    found = summary(rows)
    assert found["metric_value_mean"] == pytest.approx(0.6)
    assert (found["latency_ms_mean"], found["flops_mean"]) == (15, 150)
    assert (found["row_count"], found["min_loop_count"], found["max_loop_count"]) == (2, 1, 2)
    assert found["dei"]["depth_efficiency_index"] == [pytest.approx(0.002)]


def test_summary_has_the_depth_metrics_of_its_curve():
    found = summary(measured(), DepthOptions(tolerance=0.01, threshold=0.005))
    assert found["lsp"]["loop_saturation_point"] == 2
    assert (found["ot"]["overthinking_threshold"], found["ot"]["first_harmful_depth"]) == (4, 8)
    assert found["dgr"]["depth_gain_ratio"] == pytest.approx(0.38)


def test_losses_are_judged_as_losses():
    rows = [row(loop_count=d, metric_value=v, metric_direction="lower_is_better") for d, v in ((1, 3.0), (4, 2.6))]
    assert summary(rows)["dgr"]["depth_gain_ratio"] == pytest.approx(0.4 / 3)


def test_summary_leaves_out_what_has_no_meaning():
    mixed = [row(), row(metric_name="perplexity", metric_value=9.0)]
    assert summary(mixed)["metric_value_mean"] is None and summary(mixed)["dei"] is None
    unpriced = summary([row(), row(loop_count=2)])
    assert unpriced["dei"] is None and unpriced["dgr"]["depth_gain_ratio"] == 0
    failed = summary([row(), row(loop_count=2, metric_value=None, status="failed", detail="NaN")])
    assert failed["row_count"] == 2 and failed["metric_value_mean"] == 0.5
    assert summary([])["row_count"] == 0


def test_curves_are_sorted_by_depth():
    rows = measured()
    assert curves([rows[2], row(seed=1), rows[0]]) == [[rows[0], rows[2]], [row(seed=1)]]


def test_summary_file_is_strict_json(tmp_path):
    write_summary(tmp_path / "summary.json", [*measured(), row(seed=1)])

    def refuse(word):
        raise AssertionError(word)

    content = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert content["row_count"] == 5 and [part["row_count"] for part in content["curves"]] == [4, 1]


def test_table_has_stable_columns_and_quotes(tmp_path):
    given = row(
        dataset='a "b", c',
        loop_mode="adaptive_token",
        loop_count=4,
        scheduler_diagnostics=DIAGNOSTICS,
        latency_ms_mean=10.0,
    )
    text = csv_text([given])
    header, line, end = text.split("\r\n")
    assert header == ",".join(CSV_COLUMNS) and end == ""
    assert line == (
        f'runs/model,sha256:{"0" * 64},"a ""b"", c",validation,adaptive_token,4,accuracy,0.5,10.0,,cpu,float32,0,2.0,'
        "0;1;2;1,confidence:4,,0"
    )
    write_csv(tmp_path / "rows.csv", [given, row()])
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(io.StringIO(file.read())))
    assert table[0]["dataset"] == 'a "b", c' and table[1]["average_loops_used"] == ""
