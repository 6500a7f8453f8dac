"""The loop-scaling study: grids, numbers equal to those of the metrics, and a report made from the rows alone."""

import re
import struct

import pytest

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.depth import depth_efficiency_index
from cognexis.eval_harness.metrics.depth_results import DepthOptions
from cognexis.eval_harness.result_files import read_rows, row_line
from cognexis.eval_harness.results import result_row
from cognexis.eval_harness.scaling.grid import default_grid, parse_depths
from cognexis.eval_harness.scaling.overthinking import overthinking_table, scheduler_table, signs
from cognexis.eval_harness.scaling.report import markdown, write_report
from cognexis.eval_harness.scaling.study import study_curves, value_at_compute
from tests.eval_harness.scaling.scaling_rows import DEPTHS, rows_and_samples

OPTIONS = DepthOptions(tolerance=0.01, confidence_level=0.95, num_resamples=50)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (default_grid(12), [1, 2, 4, 8, 12]),
        (default_grid(16), [1, 2, 4, 8, 16]),
        (default_grid(1), [1]),
        (default_grid(12, milestones=[3, 6, 40]), [1, 2, 3, 4, 6, 8, 12]),
        (parse_depths("8, 1, 4,4"), [1, 4, 8]),
    ],
)
def test_grid_of_depths(grid, expected):
    assert grid == expected


@pytest.mark.parametrize("text", ["", "0", "1,,2", "1,x", "-2", "1.5", "²", "1;2"])
def test_depths_that_are_none_are_refused(text):
    with pytest.raises(InvalidConfigError, match="integer of 1 or more"):
        parse_depths(text)


def test_every_curve_has_its_study():
    rows, samples = rows_and_samples()
    studies = study_curves(rows, OPTIONS, samples)
    assert [(study.first.metric_name, study.first.seed) for study in studies] == [
        ("negative_log_likelihood", 0),
        ("accuracy", 0),
        ("negative_log_likelihood", 1),
        ("accuracy", 1),
    ]
    losses = studies[0]
    assert [row.loop_count for row in losses.rows] == [*DEPTHS]
    assert (losses.recommended_default, losses.recommended_cap, losses.best_depth) == (2, 8, 8)
    assert [row.loop_count for row in studies[1].failed] == [32] and not losses.failed


def test_numbers_are_those_of_the_metrics_with_and_without_samples():
    rows, samples = rows_and_samples(seeds=(0,))
    with_samples = study_curves(rows, OPTIONS, samples)[0]
    plain = study_curves(rows, OPTIONS)[0]
    curve = plain.rows
    expected = depth_efficiency_index(
        [row.loop_count for row in curve],
        [row.metric_value for row in curve],
        [row.flops_mean for row in curve],
        direction="lower_is_better",
    )
    assert plain.depth_metrics["dei"]["depth_efficiency_index"] == [pair.value for pair in expected]
    assert with_samples.depth_metrics["dei"]["depth_efficiency_index"] == pytest.approx(
        [pair.value for pair in expected]
    )
    assert "depth_efficiency_index_confidence_interval" not in plain.depth_metrics["dei"]
    low, high = with_samples.depth_metrics["dgr"]["depth_gain_ratio_confidence_interval"]
    assert low < plain.depth_metrics["dgr"]["depth_gain_ratio"] < high


def test_three_depths_by_hand():
    rows, _ = rows_and_samples(seeds=(0,))
    points = ((1, 0.5, 10.0), (2, 0.7, 20.0), (4, 0.69, 40.0))
    content = rows[6].model_dump()
    curve = [
        result_row(content | {"loop_count": depth, "metric_value": value, "flops_mean": cost})
        for depth, value, cost in points
    ]
    (study,) = study_curves(curve, DepthOptions(definition="threshold", threshold=0.005, tolerance=0.001))
    assert study.depth_metrics["dei"]["depth_efficiency_index"] == pytest.approx([0.02, -0.0005])
    assert (study.recommended_default, study.recommended_cap) == (2, 2)
    assert study.depth_metrics["ot"]["first_harmful_depth"] == 4


def curve_of(losses, **fields):
    rows, _ = rows_and_samples(seeds=(0,))
    content = rows[0].model_dump() | {"standard_error": None} | fields
    return [
        result_row(content | {"loop_count": depth, "metric_value": loss, "flops_mean": 10.0 * depth})
        for depth, loss in losses.items()
    ]


@pytest.mark.parametrize(
    ("losses", "threshold", "harmful_beyond", "cap"),
    [
        ({1: 1.0, 2: 0.5, 4: 0.5 + 1e-6, 8: 0.5}, 2, None, 2),  # rounding
        ({1: 1.0, 2: 0.5, 4: 0.5 + 1e-6, 8: 0.7}, 2, 2, 2),  # begins small
        ({1: 1.0, 2: 0.5, 4: 0.4999, 8: 0.4998}, None, None, 2),  # as good as the best
        ({1: 1.0, 2: 0.8, 4: 0.5}, None, None, 4),
        ({1: 0.5, 2: 0.6, 4: 0.7}, 1, 1, 1),
        ({1: 0.5}, None, None, 1),
    ],
)
def test_cap_follows_from_harm_that_matters(losses, threshold, harmful_beyond, cap):
    (study,) = study_curves(curve_of(losses))
    assert study.depth_metrics["ot"]["overthinking_threshold"] == threshold
    assert (study.harmful_beyond, study.recommended_cap) == (harmful_beyond, cap)


def test_errors_of_differences_pair_the_examples():
    rows = curve_of({1: 2.0, 2: 1.5})
    samples = {rows[0].identity: [1.0, 3.0, 2.0], rows[1].identity: [0.5, 2.4, 1.6]}
    (study,) = study_curves(rows, samples=samples)
    assert study.difference_errors[1] == 0.0
    assert study.difference_errors[2] == pytest.approx(0.1 / 3**0.5)  # differences -0.5, -0.6, -0.4
    assert study.recommended_cap == 2
    samples.popitem()
    assert study_curves(rows, samples=samples)[0].difference_errors == {}


def test_noise_says_nothing_about_depth():
    rows = curve_of({1: 2.0, 2: 1.9, 4: 2.05})
    scores = {1: [1.0, 3.0, 2.0], 2: [2.0, 1.7, 2.0], 4: [3.0, 0.15, 3.0]}
    samples = {row.identity: scores[row.loop_count] for row in rows}
    (study,) = study_curves(rows, samples=samples)
    assert study.depth_metrics["ot"]["overthinking_threshold"] == 2
    assert study.harmful_beyond is None and study.recommended_cap is None
    text = markdown([study], [])
    assert "No difference between depths is larger than its noise" in text and "max_loops" not in text
    constant = study_curves(curve_of({1: 0.5, 2: 0.5}))[0]
    assert constant.recommended_cap is None


def test_rows_that_repeat_a_cost_are_no_curves():
    rows = curve_of({1: 2.0, 2: 1.5})
    costs = curve_of({1: 10.0, 2: 20.0}, metric_name="latency_ms")
    assert [study.first.metric_name for study in study_curves([*rows, *costs])] == ["negative_log_likelihood"]


def test_scheduler_gets_its_bounds_and_its_threshold():
    rows, samples = rows_and_samples(seeds=(0,))
    table = {name: (value, why) for name, value, why in scheduler_table(study_curves(rows, OPTIONS, samples))[1:]}
    assert table["max_loops"][0] == "8" and "overthinking threshold; 12 loops are worse" in table["max_loops"][1]
    assert table["default_loops"][0] == "2" and "pays most for its compute" in table["default_loops"][1]
    assert table["min_delta"][0] == "0.12"  # the eighth of the changes 1 / t
    assert scheduler_table(study_curves(rows[-1:])) == []


def test_overthinking_is_told_by_depth():
    losses = {1: 2.0, 2: 1.0, 4: 1.5}
    deltas = {1: [None], 2: [None, 0.4], 4: [None, 0.4, 0.2, 0.1]}
    rows = [
        result_row(
            row.model_dump()
            | {
                "hidden_deltas": deltas[row.loop_count],
                "hidden_norms": [1.0, 2.0, 3.0, 4.0, 6.0][: row.loop_count + 1],
                "prediction_entropy": 3.0 / row.loop_count,
                "attention_entropies": [0.5] * row.loop_count,
                "loop_gain": 1.25,
                "repetition_rate": 0.1 * row.loop_count,
                "extrapolated": row.loop_count > 2,
                "trained_max_loops": 2,
            }
        )
        for row in curve_of(losses)
    ]
    texts = {row.identity: [("say", "a\n    b" if row.loop_count < 4 else "c")] for row in rows}
    (study,) = study_curves(rows, continuations=texts)
    assert overthinking_table(study)[2:] == [
        ["2", "1", "x 1.5", "0.4", "–", "1.25", "1.5", "0.5", "20%", "trained, overthinking threshold"],
        ["4", "1.5", "x 3", "0.1", "0.5", "1.25", "0.75", "0.5", "40%", "beyond training, overthinking"],
    ]
    told = " ".join(signs(study))
    assert "is best at 2 loops (1) and 1.5 at 4; the first harmful step begins at 2." in told
    assert "Predictions become more certain beyond the best depth (entropy 1.5 to 0.75 nats), not better." in told
    assert "Greedy texts repeat themselves more (20% to 40% of four-token pieces)." in told
    assert "the norm changes by x 3." in told and "The state still moves: loop 4 changes it by 10 %." in told
    text = markdown([study], ["overthinking", "state"])
    assert "| say | 1, 2 | a↵⟨4 spaces⟩b |" in text and "|  | 4 (beyond training) | c |" in text
    assert "![overthinking](plots/overthinking.png)" in text and "plots/latency.png" not in text


def test_adaptive_row_is_compared_at_equal_compute():
    rows, _ = rows_and_samples(seeds=(0,))
    study = study_curves(rows)[0]
    (point,) = study.adaptive
    low, high = study.rows[2], study.rows[3]  # 4 and 8 loops
    assert low.flops_mean < point.row.flops_mean < high.flops_mean
    part = (point.row.flops_mean - low.flops_mean) / (high.flops_mean - low.flops_mean)
    expected = low.metric_value + part * (high.metric_value - low.metric_value)
    assert point.fixed_value == pytest.approx(expected)
    assert point.advantage == pytest.approx(expected - point.row.metric_value)
    assert value_at_compute(study.rows, 1.0) is None and value_at_compute(study.rows[:1], 1.6e6) is None


def test_study_needs_fixed_depths():
    rows, _ = rows_and_samples(seeds=(0,))
    with pytest.raises(InvalidConfigError, match="loop_mode='fixed'"):
        study_curves([row for row in rows if row.loop_mode != "fixed"])


def test_report_is_made_again_from_the_file_alone(tmp_path):
    rows, samples = rows_and_samples(seeds=(0,))
    rows = [row for row in rows if row.metric_name == "accuracy"]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(row_line, rows)))
    first = write_report(tmp_path / "a", study_curves(rows, OPTIONS, samples))
    second = write_report(tmp_path / "b", study_curves(read_rows(tmp_path / "rows.jsonl"), OPTIONS, samples))
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    names = {path.name for path in first}
    assert {"report.md", "report.html", "plot_data.json", "state.png", "latency.png"} <= names
    for path in first:
        if path.suffix == ".png":
            width, height = struct.unpack(">II", path.read_bytes()[16:24])
            assert width >= 600 and height >= 400


def test_page_is_self_contained_and_escapes(tmp_path):
    rows, _ = rows_and_samples(seeds=(0,))
    named = [result_row(row.model_dump() | {"checkpoint": "<script>x</script>|y"}) for row in rows[:2]]
    write_report(tmp_path, study_curves(named))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
    assert "script>\\|y" in (tmp_path / "report.md").read_text("utf-8")


def test_report_says_what_failed_and_what_lies_beyond_training():
    rows, _ = rows_and_samples(seeds=(0,))
    text = markdown(study_curves(rows, DepthOptions(tolerance=0.01)), [])
    assert "| multiple choice | accuracy | 32 | loss is not finite |" in text
    assert "| beyond the depth of training | 12, 16, 32 |" in text
    assert "should not go beyond 8 loops" in text


def test_study_of_one_depth_says_that_nothing_is_defined():
    rows, _ = rows_and_samples(seeds=(0,))
    text = markdown(study_curves(rows[:1]), [])
    assert "fewer than two depths" in text
