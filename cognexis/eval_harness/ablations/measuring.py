"""What a model gives under a run configuration: likelihood by depth, and under its own loop settings.

A variant that was trained is compared by ``model.default_loops`` fixed loops, and measured at every depth of
``evaluation.loop_counts``. A trained model that is only used otherwise is compared under the loop settings of the
inference section. Where a scheduler halts tokens, each token is scored at its own depth; where it halts rows, later
tokens would decide about earlier ones, so only the last token of a row has a likelihood.

FLOPs are counted by torch while one row runs under eager attention. At a mean depth m of adaptive loops they are
flops(1) + (m - 1) (flops(2) - flops(1)), which is what an implementation that skips halted tokens would do; the
scheduler's own looks at coda and head are not in them.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cognexis.artifacts.run_config import RunConfig, loop_keywords_of
from cognexis.errors import InvalidConfigError, NonFiniteError
from cognexis.eval_harness.ablations.records import DepthPoint, UsePoint
from cognexis.eval_harness.scaling.measure import measure_depth
from cognexis.eval_harness.scaling.text_rows import read_text_rows

# Keywords of generate() that a forward pass does not take.
_OF_GENERATION = (
    *("max_total_loops", "max_loops_per_token", "max_recurrent_flops", "max_wall_time_ms"),
    "max_cache_memory_bytes",
)


@dataclass(frozen=True)
class Measurement:
    """One model under one configuration.

    Attributes:
        compared: what the experiment is compared by.
        in_use: under the loop settings of the inference section, where that was measured.
        depths: by number of loops; empty where only the use of the model changed.
        faults: a sentence for each measurement that is not finite.
    """

    compared: UsePoint
    in_use: UsePoint | None
    depths: list[DepthPoint]
    faults: list[str]


def held_out_rows(config: RunConfig, tokenizer: Any, row_length: int, max_rows: int) -> Tensor:
    """Rows ``[R, T + 1]`` of all texts of the evaluation section, at equal distances from each.

    Raises:
        InvalidConfigError: there is no text, or one cannot be read.
    """
    texts = (
        [data for data in config.evaluation.datasets if data.type == "language_modeling"] if config.evaluation else []
    )
    if not texts or config.model is None:
        raise InvalidConfigError(
            "evaluation.datasets: needs one of type language_modeling", path="evaluation.datasets"
        )
    length = min(row_length, config.model.max_position_embeddings)
    found = []
    for text in texts:
        rows = read_text_rows(Path(str(text.path)), tokenizer, length, config.model.vocab_size)
        chosen = torch.linspace(0, len(rows) - 1, min(max_rows, len(rows))).round().long()
        found.append(rows[chosen])
    return torch.cat(found)


def measure(model: Any, rows: Tensor, config: RunConfig, *, with_depths: bool, in_use: bool) -> Measurement:
    """Measure a model under a resolved configuration.

    Args:
        rows: ``[R, T + 1]`` token ids.
        with_depths: measure all depths, and compare by the default one.
        in_use: measure the loop settings of the inference section; needed without depths.
    """
    evaluation: Any = config.evaluation
    default = model.config.default_loops
    depths = sorted({*(evaluation.loop_counts or ()), default}) if with_depths else []
    costs = {loops: flops_per_token(model, rows[:1, :-1], loops) for loops in sorted({1, 2, *depths})}
    points, faults = [], []
    for loops in depths:
        point, fault = _depth_point(model, rows, loops, costs[loops], evaluation.batch_size)
        points.append(point)
        faults += [fault] if fault else []
    used = _in_use(model, rows, config, costs) if in_use else None
    if used is not None and used.last_negative_log_likelihood is None:
        faults.append(f"{used.loop_mode}: a loss is not finite")
    compared = next((_as_use(point) for point in points if point.loops == default), used)
    assert compared is not None
    return Measurement(compared, used, points, faults)


def _as_use(point: DepthPoint) -> UsePoint:
    return UsePoint(
        loop_mode="fixed",
        negative_log_likelihood=point.negative_log_likelihood,
        accuracy=point.accuracy,
        mean_loops=float(point.loops),
        flops_per_token=point.flops_per_token,
        latency_ms_mean=point.latency_ms_mean,
    )


def _in_use(model: Any, rows: Tensor, config: RunConfig, costs: dict[int, float]) -> UsePoint:
    """The model under its loop settings; ``costs`` are FLOPs per token by number of loops."""
    evaluation: Any = config.evaluation
    settings = {name: value for name, value in loop_keywords_of(config).items() if name not in _OF_GENERATION}
    by_row = config.inference.loop_mode == "adaptive_sequence"
    everything = None if by_row else _scored(model, rows, settings, evaluation.batch_size, last=False)
    last = _scored(model, rows, settings, evaluation.batch_size, last=True)
    mean_loops = (everything or last).mean_loops
    return UsePoint(
        loop_mode=config.inference.loop_mode,
        negative_log_likelihood=None if everything is None else everything.loss,
        accuracy=None if everything is None else everything.accuracy,
        last_negative_log_likelihood=last.loss,
        last_accuracy=last.accuracy,
        mean_loops=mean_loops,
        flops_per_token=costs[1] + (mean_loops - 1) * (costs[2] - costs[1]),
        latency_ms_mean=(everything or last).milliseconds,
    )


@dataclass(frozen=True)
class _Score:
    loss: float | None
    accuracy: float
    mean_loops: float
    milliseconds: float


def _depth_point(model: Any, rows: Tensor, loops: int, flops: float, batch_size: int) -> tuple[DepthPoint, str]:
    content: dict[str, Any] = {
        "loops": loops,
        "flops_per_token": flops,
        "extrapolated": loops > model.config.trained_max_loops,
        "negative_log_likelihood": None,
        "accuracy": None,
    }
    try:
        found = measure_depth(model, rows, loops, batch_size=batch_size)
    except NonFiniteError as error:
        return DepthPoint(**content), f"{loops} loops: {error}"
    losses = torch.tensor(found.losses, dtype=torch.float64)
    error_of_mean = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else None
    content |= {
        "negative_log_likelihood": losses.mean().item(),
        "standard_error": error_of_mean,
        "accuracy": math.fsum(found.accuracies) / len(found.accuracies),
        "latency_ms_mean": found.latency.mean,
        "state_norms": tuple(norm if math.isfinite(norm) else None for norm in found.norms),
    }
    return DepthPoint(**content), ""


@torch.no_grad()
def _scored(model: Any, rows: Tensor, settings: dict[str, Any], batch_size: int, *, last: bool) -> _Score:
    """Scores of the last tokens of the rows or of all tokens; the loss is None if one is not finite."""
    losses: list[float] = []
    right: list[float] = []
    loops: list[float] = []
    times: list[float] = []
    for batch in rows.to(model.device).split(batch_size):
        started = time.perf_counter()
        output = model(input_ids=batch[:, :-1], use_cache=False, logits_to_keep=int(last), **settings)
        targets = batch[:, -1:] if last else batch[:, 1:]
        logits = output.logits.float()
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        losses += nats.double().flatten().tolist()
        times.append(1e3 * (time.perf_counter() - started))
        right += (logits.argmax(-1) == targets).double().flatten().tolist()
        loops += torch.as_tensor(output.loop_counts).double().flatten().tolist()
    loss = math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else None
    means = [math.fsum(values) / len(values) for values in (right, loops, times)]
    return _Score(loss, *means)


@torch.no_grad()
def flops_per_token(model: Any, row: Tensor, loops: int) -> float:
    """Matrix FLOPs per token of a forward pass over ``row`` ``[1, T]``, counted while it runs."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=row.to(model.device), num_loops=loops, use_cache=False, allow_extrapolation=True)
    finally:
        model.set_attn_implementation(chosen)
    return counter.get_total_flops() / row.shape[1]
