"""Fit a value head to measured gains, on a frozen trunk.

Each step runs the trunk once, without gradient, on rows of the training split, reads the gain of every loop from the
losses (``targets``), and takes ``updates_per_batch`` optimizer steps, each on other rows of that batch:

    L = mean over loops 1 .. L - 1 and slots of huber(head(h_i, i) - gain_i)       predicted_gain
    L = the same mean of the cross-entropy of [gain_i > threshold]                 continue_logit

A slot is a position with a target, or in the sequence form a row, whose loss is the mean over its targets. States live
for one batch and are never written to disk. Every ``eval_every`` steps the loss on rows of the validation split is
measured; the best weights are kept, and training ends after ``patience`` measurements without improvement. The
learning rate rises over the first twentieth of the steps and falls linearly to 0.

With the Huber loss an error beyond ``huber_delta`` counts by its size and not by its square: a small one makes the
head lean towards the median gain, which hides gains that are rare and large.
Letters: B rows, T tokens, H hidden width, L loops.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError, NonFiniteError
from cognexis.looping.value_head import ValueHead, attach_value_head
from cognexis.training.scheduler.depths import LoopMeasurement, run_depths
from cognexis.training.scheduler.losses import continue_loss, huber_value_loss
from cognexis.training.scheduler.rows import DataRow, RowBatch, make_batch
from cognexis.training.scheduler.targets import DepthMeasures, TargetOptions, gain_targets
from cognexis.training.scheduler.traces import check_depth

FIT_TARGETS = ("loss_delta", "accuracy_delta", "compute_normalized")
FIT_OUTPUTS = ("predicted_gain", "continue_logit")


@dataclass(frozen=True)
class FitSettings:
    """How a head is fitted; ``head`` are the settings of the head itself."""

    head: dict[str, Any] = field(default_factory=lambda: {"kind": "token", "features": ["relative_delta"]})
    num_loops: int = 8
    """Depth of the runs that gains are measured in, at least 2."""
    target: str = "loss_delta"
    """What is predicted, one of ``FIT_TARGETS``."""
    horizon: str = "best"
    """"best": the gain of the best later loop; "next": that of the next."""
    gain_threshold: float = 1e-3
    """Smallest gain in nats that is worth continuing, for continue_logit."""
    steps: int = 400
    rows_per_step: int = 16
    updates_per_batch: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    huber_delta: float = 1.0
    """In the unit of the target."""
    unlabelled: str = "ignore"
    """Real positions without a target: "ignore" them, or "zero": they have nothing to gain, which suits tasks in
    which nobody reads them and lets them halt at once."""
    eval_every: int = 25
    patience: int = 6
    validation_rows: int = 64
    """At most so many rows are measured."""
    seed: int = 0
    """Chooses the first weights and the order of the rows."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows_per_step", "updates_per_batch", "eval_every", "patience", "validation_rows"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise _fault(name, getattr(self, name), "must be an integer of at least 1")
        for name in ("learning_rate", "huber_delta"):
            if not 0 < getattr(self, name) < math.inf:
                raise _fault(name, getattr(self, name), "must be finite and positive")
        if not 0 <= self.seed < 2**32:
            raise _fault("seed", self.seed, "must be in [0, 2**32)")
        if self.unlabelled not in ("ignore", "zero"):
            raise _fault("unlabelled", self.unlabelled, "must be ignore or zero")
        if self.target not in FIT_TARGETS:
            raise _fault("target", self.target, f"must be one of {', '.join(FIT_TARGETS)}")
        if (kind := self.head.get("output_kind", "predicted_gain")) not in FIT_OUTPUTS:
            raise _fault("output_kind", kind, f"is fitted for {', '.join(FIT_OUTPUTS)} only")
        TargetOptions(horizon=self.horizon)


@dataclass(frozen=True)
class FitResult:
    """What happened.

    Attributes:
        steps: steps taken.
        best_step: step of the weights that were kept.
        validation_loss: their loss on validation rows.
        constant_loss: that of the best single number found on the same rows, for comparison.
        history: step, training loss (mean since the line before) and validation loss.
        seconds: wall clock.
    """

    steps: int
    best_step: int
    validation_loss: float
    constant_loss: float
    history: list[dict[str, float]]
    seconds: float


@dataclass(frozen=True)
class _Measured:
    """One batch: states and signals of loops 1 to L - 1, gains ``[B, T, L - 1]`` or ``[B, L - 1]``, what counts."""

    states: list[Tensor]
    signals: list[dict[str, Tensor]]
    is_real: Tensor
    gains: Tensor
    counts: Tensor


def fit_value_head(
    model: Any,
    train_rows: Sequence[DataRow],
    validation_rows: Sequence[DataRow],
    settings: FitSettings,
    report: Callable[[str], None] | None = None,
) -> FitResult:
    """Give ``model`` a new value head and train it; every other parameter stays as it is, bit by bit.

    Args:
        report: is told about each validation.

    Raises:
        InvalidConfigError: no rows, or a depth that the model does not allow.
        NonFiniteError: the loss became NaN or infinite.
    """
    check_depth(model, settings.num_loops)
    for name, rows in (("train_rows", train_rows), ("validation_rows", validation_rows)):
        if not rows:
            raise _fault(name, 0, "there must be at least one row")
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = attach_value_head(model, settings.head).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
    )
    held_out = list(validation_rows[: settings.validation_rows])
    best, best_step, best_weights = math.inf, 0, copy.deepcopy(head.state_dict())
    history: list[dict[str, float]] = []
    losses: list[Tensor] = []
    step = 0
    for step, rows in enumerate(_row_groups(train_rows, settings), start=1):
        measured = _measure(model, head, rows, settings)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _learning_rate_share(step, settings.steps)
        for part in torch.arange(len(rows)).chunk(settings.updates_per_batch):
            loss = _loss(head, measured, settings, part.to(measured.gains.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        if step % settings.eval_every and step < settings.steps:
            continue
        training = torch.stack(losses).mean().item()
        losses.clear()
        found = _validation_loss(model, head, held_out, settings)
        if not math.isfinite(training + found):
            raise NonFiniteError(f"value head: loss {training} in training, {found} in validation at step {step}")
        history.append({"step": step, "training_loss": training, "validation_loss": found})
        if report is not None:
            report(f"step {step}: loss {training:.5f}, validation {found:.5f}")
        if found < best:
            best, best_step, best_weights = found, step, copy.deepcopy(head.state_dict())
        elif step - best_step >= settings.patience * settings.eval_every:
            break
    head.load_state_dict(best_weights)
    head.to(model.dtype).train(model.training)
    constant = _constant_loss(model, head, held_out, settings)
    return FitResult(step, best_step, best, constant, history, time.perf_counter() - start)


def _row_groups(rows: Sequence[DataRow], settings: FitSettings) -> Iterator[list[DataRow]]:
    """Rows of each step: epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(settings.seed)
    waiting: list[int] = []
    for _ in range(settings.steps):
        while len(waiting) < min(settings.rows_per_step, len(rows)):
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        taken, waiting = waiting[: settings.rows_per_step], waiting[settings.rows_per_step :]
        yield [rows[index] for index in taken]


def _measure(model: Any, head: ValueHead, rows: list[DataRow], settings: FitSettings) -> _Measured:
    batch = make_batch(rows, model.config.pad_token_id or 0).to(model.device)
    visited: list[LoopMeasurement] = []
    run_depths(model, batch, settings.num_loops, visited.append)
    losses = torch.stack([measured.loss for measured in visited], dim=-1)
    scores = torch.stack([measured.score for measured in visited], dim=-1)
    counts = batch.targets >= 0 if settings.unlabelled == "ignore" else batch.is_real
    if head.kind == "sequence":
        losses, scores = _row_mean(losses, batch), _row_mean(scores, batch)
        counts = counts.any(dim=1)
    gains = gain_targets(settings.target, DepthMeasures(losses, scores), TargetOptions(settings.horizon))
    used = [{name: m.signals[name] for name in head.feature_names} for m in visited]
    return _Measured([m.state for m in visited[:-1]], used, batch.is_real, gains, counts)


def _row_mean(values: Tensor, batch: RowBatch) -> Tensor:
    """Mean ``[B, L]`` over positions with a target; ``values`` ``[B, T, L]`` are 0 elsewhere."""
    return values.sum(dim=1) / (batch.targets >= 0).sum(dim=1, keepdim=True).clamp(min=1)


def _loss(head: ValueHead, measured: _Measured, settings: FitSettings, rows: Tensor | slice = slice(None)) -> Tensor:
    """The loss of some rows of a batch, over all loops."""
    is_real = measured.is_real[rows]
    values = []
    for index, state in enumerate(measured.states):
        signals = {name: signal[rows] for name, signal in measured.signals[index].items()}
        values.append(head(state[rows], index + 1, is_real, signals))
    predictions, gains = torch.stack(values, dim=-1), measured.gains[rows]
    mask = measured.counts[rows][..., None].expand_as(gains)
    if head.output_kind == "continue_logit":
        return continue_loss(predictions, gains, settings.gain_threshold, mask)
    return huber_value_loss(predictions, gains, settings.huber_delta, mask)


def _batches(rows: list[DataRow], size: int) -> Iterator[list[DataRow]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


@torch.no_grad()
def _validation_loss(model: Any, head: ValueHead, rows: list[DataRow], settings: FitSettings) -> float:
    total, weight = 0.0, 0
    for part in _batches(rows, settings.rows_per_step):
        measured = _measure(model, head, part, settings)
        count = int(measured.counts.sum())
        total, weight = total + _loss(head, measured, settings).item() * count, weight + count
    return total / weight


@torch.no_grad()
def _constant_loss(model: Any, head: ValueHead, rows: list[DataRow], settings: FitSettings) -> float:
    """The smallest loss on ``rows`` that one number for all slots can have, among their mean and quantiles."""
    parts = [_measure(model, head, part, settings) for part in _batches(rows, settings.rows_per_step)]
    gains = torch.cat([part.gains[part.counts].flatten() for part in parts])
    if head.output_kind == "continue_logit":
        share = (gains > settings.gain_threshold).float().mean().clamp(1e-6, 1 - 1e-6)
        return continue_loss(share.logit().expand_as(gains), gains, settings.gain_threshold).item()
    ordered = gains.sort().values
    places = torch.linspace(0, len(gains) - 1, 101).round().long()
    candidates = [gains.mean(), *ordered[places.to(gains.device)]]
    return min(huber_value_loss(c.expand_as(gains), gains, settings.huber_delta).item() for c in candidates)


def _learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then linear to 0; ``step`` from 1."""
    return min(1.0, 20 * step / steps) * (1 - (step - 1) / steps)


def _fault(name: str, value: Any, reason: str) -> InvalidConfigError:
    return InvalidConfigError(f"{name}={value!r}: {reason}", path=name, value=value, reason=reason)
