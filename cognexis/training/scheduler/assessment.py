"""What a value head is worth on given traces: figures of its predictions, beside what costs nothing to know.

    value_head                          calibrated, as a scheduler sees it
    constant                            one number for all slots
    relative_delta, 1 - confidence      the signals of the rules, as predictors of the gain

A rule's signal is no gain, so for its absolute error it is replaced by the median gain of its bin, 20 bins of equal
mass; the constant is the median of all. Both are fitted on the very slots they are judged on, which favours them.
A slot is a position with a target after loops 1 to L - 1; the gain is that of the best later loop. Where the states
have settled most gains are rounding (a median of 1e-7 nats was seen), and their order says nothing:
``rank_correlation`` takes gains that are not above the threshold worth a loop as equal, ``rank_correlation_of_all``
takes all as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cognexis.training.scheduler.calibration import (
    auroc,
    expected_calibration_error,
    halt_error_rates,
    mean_absolute_error,
    rank_correlation,
    reliability_curve,
)
from cognexis.training.scheduler.frontier import (
    cheapest_point,
    constant_frontier,
    frontier,
    loop_thresholds,
    oracle_frontier,
    policies_of,
    regret,
)
from cognexis.training.scheduler.runs import run_frontier, run_outcome
from cognexis.training.scheduler.traces import DepthTraces

_STAIRS = 20


def slots_of(traces: DepthTraces, values: Tensor) -> Tensor:
    """The slots ``[N, L - 1]`` of ``values`` ``[R, T, L]`` or ``[R, T, L - 1]``."""
    return values[..., : traces.num_loops - 1][traces.has_target]


def measured_gains(traces: DepthTraces, head: Any, gain_threshold: float) -> Tensor:
    """What the head should have said, ``[N, L - 1]``: best gains, or whether they exceed ``gain_threshold``."""
    gains = slots_of(traces, traces.best_gains)
    return (gains > gain_threshold).float() if head.output_kind == "continue_logit" else gains


def predicted_gains(traces: DepthTraces, head: Any) -> Tensor:
    """What the head says, ``[N, L - 1]``, calibrated; probabilities for ``continue_logit``."""
    predictions = slots_of(traces, traces.predictions(head))
    return predictions.sigmoid() if head.output_kind == "continue_logit" else predictions


def prediction_figures(predictions: Tensor, gains: Tensor, threshold: float, gain_threshold: float) -> dict[str, Any]:
    """Error, rank and calibration of ``predictions`` ``[N, L - 1]``.

    Args:
        threshold: the prediction below which a slot halts.
        gain_threshold: the gain above which a slot is worth continuing.
    """
    flat, measured = predictions.flatten(), gains.flatten()
    curve = reliability_curve(flat, measured)
    false_halt, false_continue = halt_error_rates(flat, measured, threshold)
    return {
        "mae": mean_absolute_error(flat, measured),
        **_ranking(flat, measured, gain_threshold),
        "calibration_error": expected_calibration_error(curve),
        "false_halt_rate": false_halt,
        "false_continue_rate": false_continue,
        "mae_by_loop": [mean_absolute_error(a, b) for a, b in zip(predictions.T, gains.T, strict=True)],
        "reliability": curve,
    }


def compare_predictors(
    traces: DepthTraces, predictions: Tensor, gains: Tensor, gain_threshold: float
) -> dict[str, dict[str, float | None]]:
    """Absolute error, rank correlation and AUROC of the head and of what costs nothing; see the module docstring."""
    flat = gains.flatten()
    signals = {
        "relative_delta": slots_of(traces, traces.signals["relative_delta"]).flatten(),
        "1 - confidence": 1 - slots_of(traces, traces.signals["confidence"]).flatten(),
    }
    table: dict[str, dict[str, float | None]] = {
        "value_head": _row(predictions.flatten(), predictions.flatten(), flat, gain_threshold),
        "constant": _row(flat.median().expand_as(flat), torch.zeros_like(flat), flat, gain_threshold),
    }
    for name, signal in signals.items():
        table[name] = _row(_staircase(signal, flat), signal, flat, gain_threshold)
    return table


def _row(estimate: Tensor, ranking: Tensor, gains: Tensor, gain_threshold: float) -> dict[str, float | None]:
    return {"mae": mean_absolute_error(estimate, gains), **_ranking(ranking, gains, gain_threshold)}


def _ranking(ranking: Tensor, gains: Tensor, gain_threshold: float) -> dict[str, float | None]:
    is_worth_it = gains > gain_threshold
    return {
        "rank_correlation": rank_correlation(ranking, torch.where(is_worth_it, gains, 0)),
        "rank_correlation_of_all": rank_correlation(ranking, gains),
        "auroc": auroc(ranking, is_worth_it),
    }


def _staircase(signal: Tensor, gains: Tensor) -> Tensor:
    estimate = torch.empty_like(gains)
    for part in signal.argsort(stable=True).tensor_split(_STAIRS):
        if len(part):
            estimate[part] = gains[part].median()
    return estimate


def frontiers(
    model: Any, traces: DepthTraces, head: Any, *, dependency: str, min_loops: int = 1
) -> dict[str, list[dict[str, float]]]:
    """Frontier of every policy by name, ``constant`` and ``oracle`` among them.

    Where whole rows halt the frontier is simulated, which is exact; else the model runs with each scheduler.
    """
    found = {"constant": constant_frontier(traces)}
    for name, policy in policies_of(traces, head).items():
        if dependency == "row":
            found[name] = frontier(traces, policy, dependency=dependency, min_loops=min_loops)
        else:
            found[name] = run_frontier(model, traces, policy, dependency=dependency, min_loops=min_loops)
    return found | {"oracle": oracle_frontier(traces)}


def chosen_points(found: dict[str, list[dict[str, float]]], tolerance: float) -> dict[str, dict[str, float] | None]:
    """The cheapest point of each frontier whose loss is within ``tolerance`` of full depth; None where none is."""
    full = found["constant"][-1]["loss"]
    return {name: cheapest_point(points, full + tolerance) for name, points in found.items() if name != "oracle"}


def operating_points(
    model: Any,
    traces: DepthTraces,
    head: Any,
    thresholds: dict[str, float | None],
    oracle: Sequence[dict[str, float]],
    *,
    dependency: str,
    min_loops: int = 1,
) -> list[dict[str, Any]]:
    """What thresholds that were chosen on other rows do here, in real runs, with their distance to the oracle.

    Args:
        thresholds: by policy; that of ``constant`` is a depth. None: no threshold was good enough there.
    """
    policies = policies_of(traces, head)
    constants = {point["threshold"]: point for point in constant_frontier(traces)}
    rows: list[dict[str, Any]] = [{"policy": "full depth", **constants[traces.num_loops]}]
    for name, threshold in thresholds.items():
        if name == "constant" and threshold in constants:
            rows.append({"policy": name, **constants[threshold]})
        elif name in policies and threshold is not None:
            scheduler = policies[name].scheduler(threshold)
            found = run_outcome(
                model,
                traces.rows,
                scheduler,
                num_loops=traces.num_loops,
                dependency=dependency,
                min_loops=min_loops,
            )
            rows.append({"policy": name, "threshold": threshold, **found})
    return [row | regret(row, oracle) for row in rows]


def thresholds_by_loop(traces: DepthTraces, head: Any, tolerance: float) -> list[float]:
    """A threshold for each loop; see :func:`loop_thresholds`."""
    return loop_thresholds(predicted_gains(traces, head), slots_of(traces, traces.best_gains), tolerance)


def thresholds_by_task(
    model: Any, traces: DepthTraces, head: Any, tolerance: float, *, dependency: str, min_loops: int = 1
) -> dict[str, float | None]:
    """The head's threshold for the rows of each task; empty when no row names one."""
    chosen: dict[str, float | None] = {}
    for task in sorted({row.task for row in traces.rows if row.task is not None}):
        part = traces.select([index for index, row in enumerate(traces.rows) if row.task == task])
        found = frontiers(model, part, head, dependency=dependency, min_loops=min_loops)
        point = chosen_points(found, tolerance)["value_head"]
        chosen[task] = None if point is None else point["threshold"]
    return chosen
