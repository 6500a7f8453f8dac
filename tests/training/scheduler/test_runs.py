"""Real runs against the simulation: equal where whole rows halt, and honest where single tokens do."""

import pytest
import torch

from cognexis.looping.value_head import attach_value_head
from cognexis.training.scheduler.frontier import constant_frontier, frontier, halting_loops, outcome, policies_of
from cognexis.training.scheduler.rows import DataRow
from cognexis.training.scheduler.runs import run_frontier, run_outcome
from cognexis.training.scheduler.traces import collect_traces
from tests.batteries.tiny import tiny_config, tiny_model

L = 4


@pytest.fixture(scope="module")
def measured():
    model = tiny_model(tiny_config(vocab_size=12, num_prelude_blocks=1))
    head = attach_value_head(model, {"kind": "token", "bottleneck_size": 8, "features": ["relative_delta"]})
    with torch.no_grad():
        head.output_proj.weight.mul_(5)
        head.output_proj.bias.fill_(0.5)
    head.set_calibration({"method": "linear", "scale": 0.5, "offset": 0.3})
    lengths = [5, 9, 9, 7, 3, 9, 6, 8]
    ids = [torch.randint(0, 12, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]
    rows = [DataRow(f"line-{i}", tuple(row.tolist()), (*row[1:].tolist(), -100)) for i, row in enumerate(ids)]
    return model, collect_traces(model, rows, L, head=head)


@pytest.mark.parametrize("name", ["relative_delta", "prediction_change", "value_head"])
def test_run_equals_the_simulation_where_whole_rows_halt(measured, name):
    model, traces = measured
    policy = policies_of(traces, model.model.value_head)[name]
    points = frontier(traces, policy, dependency="row")
    assert 1 <= points[0]["mean_loops"] < points[-1]["mean_loops"]
    for point in points[:: max(1, len(points) // 6)]:
        scheduler = policy.scheduler(point["threshold"])
        found = run_outcome(model, traces.rows, scheduler, num_loops=L, dependency="row", batch_size=3)
        assert found == pytest.approx({key: point[key] for key in found}, rel=1e-4)


def test_run_at_full_depth_and_at_the_minimum_are_the_fixed_runs(measured):
    model, traces = measured
    constants = constant_frontier(traces)
    never, always = {"type": "rule_based", "min_delta": 0.0}, {"type": "rule_based", "min_delta": 1e9}
    for scheduler, place in ((never, L), (always, 2)):
        for dependency in ("token", "prefix", "row"):
            found = run_outcome(model, traces.rows, scheduler, num_loops=L, dependency=dependency, min_loops=2)
            assert found == pytest.approx({key: constants[place - 1][key] for key in found}, rel=1e-4)


def test_halted_tokens_keep_their_state_which_the_simulation_does_not_know(measured):
    model, traces = measured
    policy = policies_of(traces)["relative_delta"]
    threshold = policy.signal[traces.is_real].median().item()
    found = run_outcome(model, traces.rows, policy.scheduler(threshold), num_loops=L, dependency="token")
    simulated = outcome(traces, halting_loops(policy.halts(threshold), traces.is_real, "token"))
    assert 1 < found["mean_loops"] < L and abs(found["loss"] - simulated["loss"]) > 1e-4


def test_thresholds_of_runs_are_spread_over_the_loops(measured):
    model, traces = measured
    policy = policies_of(traces)["relative_delta"]
    points = run_frontier(model, traces, policy, dependency="prefix")
    loops = [point["mean_loops"] for point in points]
    assert loops == sorted(loops) and loops[0] < 1.5 and loops[-1] == L
    assert 4 <= len({point["threshold"] for point in points}) == len(points) <= 12
