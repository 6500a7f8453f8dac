"""Halting simulated on traces that were made up, so that every answer is known."""

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.registry import build_scheduler
from cognexis.training.scheduler.frontier import (
    Policy,
    cheapest_point,
    constant_frontier,
    default_thresholds,
    frontier,
    halting_loops,
    loop_thresholds,
    oracle_frontier,
    outcome,
    policies_of,
    regret,
)
from cognexis.training.scheduler.rows import DataRow
from cognexis.training.scheduler.traces import SIGNALS, DepthTraces

L = 6


def made_up(rows: int = 40, length: int = 8) -> DepthTraces:
    """Each token's loss is 1 until its own loop of arrival and 0 from there on; the last rows are shorter."""
    arrival = torch.randint(1, L + 1, (rows, length))
    losses = (torch.arange(1, L + 1) < arrival[..., None]).float()
    is_real = torch.arange(length) < torch.where(torch.arange(rows) % 4 == 0, 5, length)[:, None]
    losses = losses * is_real[..., None]
    noise = 0.2 * torch.rand(losses.shape)
    signals = dict.fromkeys(SIGNALS, losses + noise) | {"confidence": 1 - 0.5 * losses - noise}
    data = tuple(DataRow(f"line-{i}", (1,) * length, (1,) * length) for i in range(rows))
    return DepthTraces(data, is_real, is_real.clone(), losses, 1 - losses, signals)


def test_token_halts_at_its_first_agreeing_loop_after_the_minimum():
    halts = torch.zeros(1, 4, 4, dtype=torch.bool)
    halts[0, 0, 0] = halts[0, 1, 2] = halts[0, 3, 0] = True  # token 2 never agrees, token 3 is padding
    is_real = torch.tensor([[True, True, True, False]])
    assert halting_loops(halts, is_real).tolist() == [[1, 3, 4, 0]]
    assert halting_loops(halts, is_real, min_loops=2).tolist() == [[4, 3, 4, 0]]


def test_prefix_waits_for_earlier_tokens_and_row_for_all():
    halts = torch.zeros(1, 3, 5, dtype=torch.bool)
    halts[0, 0, 1:] = halts[0, 1, 0:] = halts[0, 2, 3:] = True
    is_real = torch.ones(1, 3, dtype=torch.bool)
    assert halting_loops(halts, is_real, "token").tolist() == [[2, 1, 4]]
    assert halting_loops(halts, is_real, "prefix").tolist() == [[2, 2, 4]]
    assert halting_loops(halts, is_real, "row").tolist() == [[4, 4, 4]]
    with pytest.raises(InvalidConfigError, match="halt_dependency='rows': must be one of token, prefix, row"):
        halting_loops(halts, is_real, "rows")
    with pytest.raises(InvalidConfigError, match="min_loops=6: must lie between 1 and 5"):
        halting_loops(halts, is_real, min_loops=6)


def test_outcome_reads_each_token_at_its_own_loop_and_counts_no_padding():
    traces = made_up(rows=4, length=6)
    loops = torch.randint(1, L + 1, (4, 6)) * traces.is_real
    found = outcome(traces, loops)
    places = traces.is_real.nonzero().tolist()
    losses = [traces.losses[r, t, loops[r, t] - 1].item() for r, t in places]
    assert found["loss"] == pytest.approx(sum(losses) / len(places))
    assert found["accuracy"] == pytest.approx(1 - sum(losses) / len(places))
    assert found["mean_loops"] == pytest.approx(sum(loops[r, t].item() for r, t in places) / len(places))


def test_constant_frontier_has_a_point_for_every_depth():
    traces = made_up()
    points = constant_frontier(traces)
    assert [point["mean_loops"] for point in points] == [1, 2, 3, 4, 5, 6]
    expected = [traces.losses[..., i][traces.has_target].mean().item() for i in range(L)]
    assert [point["loss"] for point in points] == pytest.approx(expected)


def test_oracle_stops_when_the_answer_arrives_and_nobody_does_better():
    traces = made_up()
    oracle = oracle_frontier(traces)
    arrival = traces.losses.sum(-1)[traces.is_real] + 1
    assert oracle[-1]["loss"] == pytest.approx(0) and oracle[-1]["mean_loops"] == pytest.approx(arrival.mean().item())
    assert oracle[0]["mean_loops"] == 1
    for policy in policies_of(traces).values():
        points = frontier(traces, policy)
        for point in [*points, *constant_frontier(traces)]:
            found = regret(point, oracle)
            assert min(value for value in found.values() if value is not None) >= -1e-6
        cheapest = cheapest_point(points, 0.0)
        assert cheapest is not None and cheapest["mean_loops"] < 5
        assert cheapest["mean_loops"] == min(point["mean_loops"] for point in points if point["loss"] == 0)


def test_oracle_is_the_best_of_all_assignments():
    traces = made_up(rows=1, length=3)
    traces.losses.copy_(torch.rand(traces.losses.shape))
    oracle = oracle_frontier(traces)
    for loops in torch.cartesian_prod(*[torch.arange(1, L + 1)] * 3):
        point = outcome(traces, loops[None])
        assert all(value is None or value >= -1e-6 for value in regret(point, oracle).values())


def test_regret_interpolates_and_is_none_where_the_oracle_has_no_such_point():
    oracle = [{"mean_loops": 2.0, "loss": 0.5}, {"mean_loops": 4.0, "loss": 0.1}]
    assert regret({"mean_loops": 3.5, "loss": 0.3}, oracle) == pytest.approx({"loops_regret": 0.5, "loss_regret": 0.1})
    assert regret({"mean_loops": 5.0, "loss": 0.7}, oracle) == pytest.approx({"loops_regret": 3.0, "loss_regret": 0.6})
    assert regret({"mean_loops": 1.0, "loss": 0.05}, oracle) == {"loops_regret": None, "loss_regret": None}
    assert cheapest_point(oracle, 0.05) is None and cheapest_point(oracle, 0.2) == oracle[1]


def test_thresholds_span_the_signal_and_are_settings_that_schedulers_take():
    traces = made_up()
    for policy in policies_of(traces).values():
        thresholds = default_thresholds(traces, policy)
        points = frontier(traces, policy, thresholds=thresholds)
        assert thresholds == sorted(set(thresholds)) and thresholds[0] >= 1e-6
        assert points[0]["mean_loops"] < 1.5 and points[-1]["mean_loops"] > 5
        scheduler = build_scheduler(policy.scheduler(thresholds[3]))
        assert scheduler.to_dict()[policy.field] == thresholds[3]


def test_nan_never_halts():
    policy = Policy("x", torch.full((1, 1, 3), float("nan")))
    assert not policy.halts(1.0).any()


def test_loop_thresholds_give_away_what_is_allowed_and_no_more():
    predictions = torch.tensor([[0.1, 0.5], [0.2, 0.4], [0.3, 0.3], [0.4, 0.2]])
    gains = torch.tensor([[0.0, 0.9], [0.1, 0.0], [0.5, 0.0], [1.0, 0.0]])
    first, second = loop_thresholds(predictions, gains, tolerance=0.03)
    assert first == pytest.approx(0.3)  # halting 0.1 and 0.2 gives away 0.1 / 4; 0.3 as well would be 0.6 / 4
    assert second == pytest.approx(0.5)
    assert loop_thresholds(predictions, gains, tolerance=9.0) == pytest.approx([0.4, 0.5], abs=1e-5)
