"""Figures about a value head on traces that were made up."""

import pytest
import torch

from cognexis.looping.value_head import ValueHead
from cognexis.training.scheduler.assessment import (
    chosen_points,
    compare_predictors,
    measured_gains,
    predicted_gains,
    prediction_figures,
    slots_of,
    thresholds_by_loop,
)
from cognexis.training.scheduler.rows import DataRow
from cognexis.training.scheduler.traces import SIGNALS, DepthTraces

HEAD = {"kind": "token", "bottleneck_size": 4}
ROWS = (DataRow("line-1", (1, 2), (2, -100)), DataRow("line-2", (1, 2), (2, 3)))


def made_up() -> DepthTraces:
    """Three slots by three loops; the head says what the gain will be, plus 0.1."""
    losses = torch.tensor([[[1.0, 0.6, 0.1], [0.0, 0.0, 0.0]], [[0.5, 0.5, 0.5], [0.4, 0.1, 0.3]]])
    is_real = torch.ones(2, 2, dtype=torch.bool)
    has_target = torch.tensor([[True, False], [True, True]])
    traces = DepthTraces(ROWS, is_real, has_target, losses, losses, dict.fromkeys(SIGNALS, losses))
    values = torch.nn.functional.pad(traces.best_gains, (0, 1)) + 0.1
    return DepthTraces(ROWS, is_real, has_target, losses, losses, traces.signals, values)


def test_slots_are_the_positions_with_a_target_before_the_last_loop():
    traces = made_up()
    assert torch.equal(slots_of(traces, traces.losses), torch.tensor([[1.0, 0.6], [0.5, 0.5], [0.4, 0.1]]))
    torch.testing.assert_close(
        slots_of(traces, traces.best_gains), torch.tensor([[0.9, 0.5], [0.0, 0.0], [0.3, -0.2]])
    )


def test_figures_of_a_head_that_is_off_by_a_constant():
    traces, head = made_up(), ValueHead(4, HEAD)
    gains = measured_gains(traces, head, 0.05)
    found = prediction_figures(predicted_gains(traces, head), gains, threshold=0.15, gain_threshold=0.05)
    assert found["mae"] == pytest.approx(0.1) and found["mae_by_loop"] == pytest.approx([0.1, 0.1])
    assert found["rank_correlation_of_all"] == pytest.approx(1.0) and found["auroc"] == 1.0
    assert 0.9 < found["rank_correlation"] < 1.0  # 0.0 and -0.2 are both not worth a loop
    assert found["calibration_error"] == pytest.approx(0.1)
    assert (found["false_halt_rate"], found["false_continue_rate"]) == (0.0, 0.0)
    head.set_calibration({"method": "linear", "scale": 1.0, "offset": -0.1})
    assert prediction_figures(predicted_gains(traces, head), gains, 0.15, 0.05)["mae"] == pytest.approx(0, abs=1e-6)


def test_probabilities_are_compared_with_whether_it_was_worth_it():
    traces, head = made_up(), ValueHead(4, HEAD | {"output_kind": "continue_logit"})
    assert measured_gains(traces, head, 0.05).tolist() == [[1, 1], [0, 0], [1, 0]]
    torch.testing.assert_close(predicted_gains(traces, head), slots_of(traces, traces.values).sigmoid())


def test_constant_and_signals_are_judged_at_their_best():
    traces, head = made_up(), ValueHead(4, HEAD)
    gains = measured_gains(traces, head, 0.05)
    table = compare_predictors(traces, predicted_gains(traces, head), gains, 0.05)
    assert set(table) == {"value_head", "constant", "relative_delta", "1 - confidence"}
    assert table["constant"]["mae"] == pytest.approx((gains - gains.median()).abs().mean().item())
    assert table["constant"]["rank_correlation"] is None and table["constant"]["auroc"] == 0.5
    assert table["relative_delta"]["mae"] == pytest.approx(0)  # six slots in bins of one
    order = table["1 - confidence"]["rank_correlation"], table["relative_delta"]["rank_correlation"]
    assert None not in order and order[0] == pytest.approx(-order[1])


def test_chosen_points_are_the_cheapest_within_the_tolerance():
    points = [
        {"threshold": float(i), "mean_loops": float(i), "loss": loss} for i, loss in ((1, 0.9), (2, 0.3), (3, 0.25))
    ]
    found = {"constant": points, "head": points[:1], "oracle": points}
    assert chosen_points(found, 0.1) == {"constant": points[1], "head": None}
    assert chosen_points(found, 0.0)["constant"] == points[2]


def test_thresholds_by_loop_follow_the_predictions():
    traces, head = made_up(), ValueHead(4, HEAD)
    first, second = thresholds_by_loop(traces, head, tolerance=0.11)
    assert first == pytest.approx(1.0)  # halting 0.1 and 0.4 gives away 0.3 / 3
    assert second == pytest.approx(0.6)
