"""Pairs of adaptive and fixed rows, by hand."""

import pytest

from cognexis.eval_harness.results import result_row
from cognexis.eval_harness.runner.matched import matched_pairs, nearest_depth

BASE = {
    "checkpoint": "m",
    "tokenizer_checksum": "t",
    "dataset": "d",
    "split": "test",
    "task_version": "1",
    "prompt_format": "none",
    "decoding": {},
    "num_examples": 4,
    "seed": 1,
    "hardware": "h",
    "dtype": "float32",
}


def row(loops, value, mean=None, *, name="accuracy", direction="higher_is_better", **changes):
    given = {**BASE, "loop_mode": "fixed", "loop_count": loops, "metric_name": name, "metric_value": value}
    given |= {"metric_direction": direction, "flops_mean": 10.0 * (mean or loops)}
    if mean is not None:
        diagnostics = {"average_loops_used": mean, "loop_count_histogram": []}
        given |= {"loop_mode": "adaptive_token", "scheduler_diagnostics": diagnostics, "decoding": {"loops": {"a": 1}}}
    return result_row({**given, **changes})


@pytest.mark.parametrize(("mean", "depth"), [(0.2, 1), (1.49, 1), (1.5, 2), (2.5, 3), (7.9, 8)])
def test_nearest_depth_rounds_halves_up(mean, depth):
    assert nearest_depth(mean) == depth


def test_pair_is_the_nearest_row_and_the_curve_between():
    rows = [row(4, 0.8), row(1, 0.2), row(3, 0.6), row(8, 0.75, 3.25)]
    (pair,) = matched_pairs(rows)
    assert (pair["fixed_loop_count"], pair["fixed_value"], pair["adaptive_value"]) == (3, 0.6, 0.75)
    assert pair["fixed_value_at_mean_loops"] == pytest.approx(0.65)
    assert pair["advantage"] == pytest.approx(0.1) and pair["adaptive_flops"] == 32.5 and pair["fixed_flops"] == 30.0


def test_smaller_losses_are_advantages():
    rows = [row(2, 3.0, name="nll", direction="lower_is_better")]
    rows.append(row(8, 2.5, 2.0, name="nll", direction="lower_is_better"))
    assert matched_pairs(rows)[0]["advantage"] == 0.5


@pytest.mark.parametrize(
    "changes", [{"dataset": "other"}, {"metric_name": "other"}, {"seed": 2}, {"decoding": {"temperature": 1.0}}]
)
def test_rows_of_another_measurement_are_no_partners(changes):
    (pair,) = matched_pairs([row(2, 0.5, **changes), row(8, 0.6, 2.0)])
    assert pair["fixed_value"] is None and pair["advantage"] is None


def test_outside_the_curve_there_is_no_value_and_failed_rows_have_no_pair():
    failed = row(8, None, status="failed", detail="x", loop_mode="adaptive_token")
    (pair,) = matched_pairs([row(1, 0.5), row(2, 0.6), row(8, 0.9, 2.2), failed])
    assert (pair["fixed_loop_count"], pair["fixed_value_at_mean_loops"]) == (2, None)
