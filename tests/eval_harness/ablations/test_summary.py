"""From runs to results: differences, states and the summary."""

import pytest

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.ablations.plot_data import pareto_data
from cognexis.eval_harness.ablations.records import AblationResult, AblationRun, ExperimentRecord, UsePoint
from cognexis.eval_harness.ablations.summary import result_of, summarize
from cognexis.eval_harness.results import checked
from tests.eval_harness.ablations.test_plan import RECORD


def record(**changes):
    return ExperimentRecord.model_validate(RECORD | changes)


def use(loss, flops=100.0, mode="fixed", last=None):
    return UsePoint(
        loop_mode=mode,
        negative_log_likelihood=loss,
        last_negative_log_likelihood=last,
        mean_loops=2.0,
        flops_per_token=flops,
    )


def run(name, seed, compared=None, status="completed", **changes):
    content = {
        "experiment": name,
        "seed": seed,
        "status": status,
        "method": "retrained",
        "config_checksum": "sha256:0",
    }
    content |= {"metric_name": "negative_log_likelihood", "compared": compared}
    content |= {"parameter_count": 5} | changes
    return AblationRun.model_validate(content)


def test_summary_of_one_completed_and_one_unstable_result():
    completed = AblationResult(name="a", plan=record(), status="completed", metric_delta=0.1)
    unstable = AblationResult(name="b", plan=record(), status="unstable", metric_delta=0.7, non_finite_count=3)
    found = summarize([completed, unstable])
    assert (found["runs"], found["completed"], found["unstable"]) == (2, 1, 1)
    assert found["best_metric_delta"] == pytest.approx(0.1) and found["best"] == "a"
    assert summarize([unstable])["best_metric_delta"] is None


def test_differences_are_paired_by_seed_and_above_zero_is_better():
    baselines = {0: run("baseline", 0, use(3.0)), 1: run("baseline", 1, use(4.0, 110.0))}
    found = result_of(record(seeds=[0, 1]), [run("a", 0, use(2.5, 80.0)), run("a", 1, use(4.2, 80.0))], baselines)
    assert found.metric_delta_by_seed == pytest.approx({"0": 0.5, "1": -0.2})
    assert found.metric_delta == pytest.approx(0.15) and found.compute_delta == pytest.approx(-25.0)
    assert found.metric_delta_error == pytest.approx(0.35)  # half the distance of two values
    assert found.status == "completed" and found.parameter_count == 5


def test_accuracy_is_not_turned():
    settings = {"metric_name": "accuracy"}
    point = UsePoint(loop_mode="fixed", accuracy=0.5, mean_loops=1.0, flops_per_token=1.0)
    better = point.model_copy(update={"accuracy": 0.75})
    found = result_of(record(), [run("a", 0, better, **settings)], {0: run("baseline", 0, point, **settings)})
    assert found.metric_delta == 0.25


def test_unstable_runs_are_kept_marked_and_give_no_difference():
    unstable = run("a", 1, use(9.0), status="unstable", detail="diverged", non_finite_count=2)
    baselines = {seed: run("baseline", seed, use(3.0)) for seed in (0, 1)}
    found = result_of(record(seeds=[0, 1]), [run("a", 0, use(2.0)), unstable], baselines)
    assert found.status == "unstable" and found.non_finite_count == 2
    assert found.metric_delta_by_seed == {"0": 1.0} and found.notes == ("seed 1: diverged",)
    missing = result_of(record(seeds=[0, 1]), [run("a", 0, use(2.0))], baselines)
    assert missing.status == "planned"


def test_a_switched_variant_is_compared_with_the_baseline_in_use():
    baseline = run("baseline", 0, use(3.0), in_use=use(3.5, 60.0, "adaptive_token", last=3.2))
    fixed = run("a", 0, use(3.1, 100.0, last=3.0), method="switched")
    found = result_of(record(), [fixed], {0: baseline})
    assert found.metric_delta == pytest.approx(0.4) and found.compute_delta == 40.0
    rows = run("a", 0, use(None, 60.0, "adaptive_sequence", last=3.3), method="switched")
    found = result_of(record(), [rows], {0: baseline})
    assert found.metric_delta == pytest.approx(-0.1) and "last token" in found.notes[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "unstable"}, "needs a detail"),
        ({"status": "completed"}, "needs a value"),
        ({"compared": use(1.0), "seed": -1}, "seed"),
        ({"compared": use(1.0), "status": "done"}, "status"),
        ({"compared": use(1.0), "more": 1}, "more"),
        ({"compared": use(1.0).model_copy(update={"mean_loops": float("nan")}).model_dump()}, "mean_loops"),
    ],
)
def test_a_run_is_strict(change, words):
    content = run("a", 0, use(1.0)).model_dump() | {"compared": None} | change
    with pytest.raises(InvalidConfigError, match=words):
        checked(AblationRun, content, "run")


def test_points_that_another_one_beats_are_not_on_the_front():
    from types import SimpleNamespace

    points = {"baseline": (3.0, 100.0), "cheap": (3.5, 50.0), "worse": (3.6, 60.0), "same": (3.0, 120.0)}
    plan = SimpleNamespace(
        file=SimpleNamespace(metric="negative_log_likelihood"),
        experiments=[SimpleNamespace(name=name) for name in (*points, "broken", "rows")],
    )
    runs = [run(name, 0, use(*values)) for name, values in points.items()]
    runs.append(run("broken", 0, status="unstable", detail="diverged"))
    runs.append(run("rows", 0, use(None, 10.0, "adaptive_sequence", last=1.0), method="switched"))
    data = pareto_data(plan, runs)
    assert {point["experiment"]: point["on_front"] for point in data["points"]} == {
        "baseline": True,
        "cheap": True,
        "worse": False,
        "same": False,
    }
    assert data["without_value"] == {"broken": "unstable", "rows": "last tokens only"}
