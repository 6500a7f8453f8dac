"""Quality against loops in real runs, where a token that halts keeps its state.

A simulation on traces (``frontier``) lets the states of halted tokens loop on. For whole rows that is no difference,
since nothing of a row goes on when it halts. For single tokens it is: later tokens read the state that the halted one
kept, and a state can give the right answer loops before it has settled. So thresholds for ``token`` and ``prefix`` are
chosen and judged by running the model with the scheduler itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cognexis.looping.signals import log_probabilities
from cognexis.training.scheduler.frontier import Policy, frontier
from cognexis.training.scheduler.rows import DataRow, make_batch
from cognexis.training.scheduler.traces import DepthTraces, row_groups

NUM_THRESHOLDS = 12


@torch.no_grad()
def run_outcome(
    model: Any,
    rows: Sequence[DataRow],
    scheduler: dict[str, Any],
    *,
    num_loops: int,
    dependency: str,
    min_loops: int = 1,
    batch_size: int = 16,
) -> dict[str, float]:
    """Mean loops over real tokens, mean loss and accuracy over tokens with a target, in runs of ``rows``.

    Args:
        scheduler: settings as in ``scheduler.json``.
        num_loops: upper bound of the runs.
        dependency: "token", "prefix" or "row".
    """
    totals = torch.zeros(5, dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    for indices in row_groups(order, rows, model.config.vocab_size, batch_size):
        batch = make_batch([rows[i] for i in indices], model.config.pad_token_id or 0).to(model.device)
        outputs = model(
            input_ids=batch.input_ids,
            attention_mask=None if bool(batch.is_real.all()) else batch.is_real.long(),
            loop_mode="adaptive_token",
            min_loops=min_loops,
            max_loops=num_loops,
            scheduler=scheduler,
            halt_dependency=dependency,
            use_cache=False,
        )
        has_target = batch.targets >= 0
        log_probs = log_probabilities(outputs.logits[has_target])
        targets = batch.targets[has_target]
        found = (
            outputs.loop_counts[batch.is_real].sum(),
            batch.is_real.sum(),
            nn.functional.nll_loss(log_probs, targets, reduction="sum"),
            (log_probs.argmax(-1) == targets).sum(),
            has_target.sum(),
        )
        totals += torch.stack([_number(value) for value in found])
    loops, tokens, loss, right, labelled = totals.tolist()
    return {"mean_loops": loops / tokens, "loss": loss / labelled, "accuracy": right / labelled}


def run_frontier(
    model: Any, traces: DepthTraces, policy: Policy, *, dependency: str, min_loops: int = 1
) -> list[dict[str, float]]:
    """A point for each of some thresholds, in the order of their mean loops, from runs of the rows of ``traces``.

    The thresholds are those whose simulated mean loops lie evenly between the fewest and the most.
    """
    simulated = frontier(traces, policy, dependency=dependency, min_loops=min_loops)
    points = []
    for threshold in _spread(simulated):
        found = run_outcome(
            model,
            traces.rows,
            policy.scheduler(threshold),
            num_loops=traces.num_loops,
            dependency=dependency,
            min_loops=min_loops,
        )
        points.append({"threshold": threshold, **found})
    return sorted(points, key=lambda point: (point["mean_loops"], point["loss"]))


def _spread(points: Sequence[dict[str, float]]) -> Iterator[float]:
    """Thresholds of some ``points`` whose mean loops are spread evenly, each once."""
    first, last = points[0]["mean_loops"], points[-1]["mean_loops"]
    wanted = [first + (last - first) * i / (NUM_THRESHOLDS - 1) for i in range(NUM_THRESHOLDS)]
    nearest = [min(points, key=lambda point: abs(point["mean_loops"] - loops))["threshold"] for loops in wanted]
    yield from dict.fromkeys(nearest)


def _number(value: Tensor) -> Tensor:
    return value.detach().double().cpu()
