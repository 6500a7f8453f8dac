"""Training and testing one stack on one task.

    logits = Linear(stack(Embedding(ids))[:, -1])

AdamW with cross-entropy; the learning rate rises over the first 5 % of the updates and falls along a half cosine to
zero. The weights with the best validation accuracy are the ones that are tested, once. Where the task offers easier
data, training begins with so many passes over each of them as ``easier_epochs`` says.

With ``chunk_size`` C only the last C tokens are trained on: everything before runs in pieces of C without gradient,
and the state is detached. What earlier tokens contribute can then reach only parameters whose state carries
sensitivities, those of the Axon recurrence: their gradient equals that of the whole sequence as long as nothing
stateful lies above them. ``axons_parity_probe`` measures how equal it is.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.state import detach_state
from cognexis.cortex_layers.types import MaybeState
from cognexis.errors import InvalidConfigError, NonFiniteError
from cognexis.tasks.sequence_task import SequenceTask, Splits

AXON_PARAMETERS = ("nu_log", "theta_log", "w1", "w2", "Wc1", "Wc2")
_WARM_UP = 0.05


@dataclass(frozen=True)
class TrainingSettings:
    """How a stack is trained.

    Args:
        epochs: passes over the training part.
        easier_epochs: passes over each of the easier data sets, before that.
        batch_size: sequences per update.
        lr: highest learning rate.
        weight_decay: of every parameter outside the Axon recurrences.
        grad_clip: largest norm of a gradient.
        seed: initial weights and order of the samples.
        stop_at: training ends early once the validation accuracy reaches this.
        max_seconds: training ends with the epoch in which this time passes; None means never.
        chunk_size: train on the last so many tokens only; None means on all.
        axon_lr_mult: factor on the learning rate of the Axon recurrences.
        axon_weight_decay: their weight decay.
        rtu_disable_traces_last_chunk: zero the carried sensitivities in front of the last chunk.
        reset_state_before_last_chunk: start the last chunk from a fresh state; shows what the memory contributes.
        axons_parity_probe: compare the gradients of the Axon recurrences with those of the whole sequence every so
            many updates; 0 means never.
        device: where to compute.
    """

    epochs: int = 5
    easier_epochs: int = 0
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    seed: int = 42
    stop_at: float = 1.0
    max_seconds: float | None = None
    chunk_size: int | None = None
    axon_lr_mult: float = 1.0
    axon_weight_decay: float = 0.0
    rtu_disable_traces_last_chunk: bool = False
    reset_state_before_last_chunk: bool = False
    axons_parity_probe: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        rules = [
            ("epochs", self.epochs >= 1, "must be at least 1"),
            ("easier_epochs", self.easier_epochs >= 0, "must be 0 or more"),
            ("batch_size", self.batch_size >= 1, "must be at least 1"),
            ("lr", 0 < self.lr < math.inf, "must be above 0 and finite"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "must be 0 or more and finite"),
            ("grad_clip", self.grad_clip > 0, "must be above 0"),
            ("seed", 0 <= self.seed < 2**63, "must be between 0 and 2^63 - 1"),
            ("stop_at", self.stop_at > 0, "must be above 0; above 1 it never stops early"),
            ("max_seconds", self.max_seconds is None or self.max_seconds > 0, "must be above 0"),
            ("chunk_size", self.chunk_size is None or self.chunk_size >= 1, "must be at least 1"),
            ("axon_lr_mult", 0 <= self.axon_lr_mult < math.inf, "must be 0 or more and finite"),
            ("axon_weight_decay", 0 <= self.axon_weight_decay < math.inf, "must be 0 or more and finite"),
            ("axons_parity_probe", self.axons_parity_probe >= 0, "must be 0 or more"),
        ]
        chunk_options = ("rtu_disable_traces_last_chunk", "reset_state_before_last_chunk", "axons_parity_probe")
        rules += [
            (name, self.chunk_size is not None or not getattr(self, name), "needs chunk_size")
            for name in chunk_options
        ]
        for name, is_right, reason in rules:
            if not is_right:
                value = getattr(self, name)
                raise InvalidConfigError(f"{name}={value!r}: {reason}", path=name, value=value, reason=reason)


@dataclass
class TrainingResult:
    """What came out of a training.

    Args:
        test_accuracy: of the weights with the best validation accuracy.
        best_epoch: the epoch, from 1, after which they were reached.
        majority_class: share of the most frequent label in the test part, what guessing achieves.
        history: per epoch the mean training loss, the validation accuracy and the seconds since the start.
        parity: per probe the update and the largest relative difference of an Axon parameter's gradient.
    """

    test_accuracy: float = 0.0
    val_accuracy: float = 0.0
    best_epoch: int = 0
    majority_class: float = 0.0
    num_parameters: int = 0
    num_updates: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    parity: list[dict[str, float]] = field(default_factory=list)


class SequenceClassifier(nn.Module):
    """Embedding, stack, last step, linear read-out."""

    def __init__(self, stack: nn.Module, width: int, vocab_size: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.stack = stack
        self.head = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor, state: MaybeState = None) -> tuple[Tensor, MaybeState]:
        """Logits ``[B, classes]`` behind the last token of ids ``[B, T]``, and the state."""
        x = self.embedding(ids)
        x = x.to(next((parameter.dtype for parameter in self.stack.parameters()), x.dtype))
        y, state = self.stack(x, state)
        return self.head(y[:, -1].to(self.head.weight.dtype)), state


def train_classifier(
    build: Callable[[], nn.Module],
    width: int,
    splits: Splits,
    settings: TrainingSettings,
    *,
    easier: Sequence[SequenceTask] = (),
    on_update: Callable[[int, int, float], None] = lambda update, total, loss: None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, entry: None,
) -> TrainingResult:
    """Train the stack that ``build`` makes, and test it.

    Args:
        easier: what to train on first, ``easier_epochs`` times each; validation begins with the task itself.
        on_update: called with the number of updates done, their total, and the loss.
        on_epoch: called with the epoch, from 1, and its entry of the history.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = SequenceClassifier(build(), width, splits.train.vocab_size, splits.train.num_classes)
        first = [part for part in easier for _ in range(settings.easier_epochs)]
        return _train(model.to(settings.device), splits, first, settings, on_update, on_epoch)


def _train(
    model: SequenceClassifier,
    splits: Splits,
    first: list[SequenceTask],
    settings: TrainingSettings,
    on_update: Callable[[int, int, float], None],
    on_epoch: Callable[[int, dict[str, float]], None],
) -> TrainingResult:
    order = torch.Generator().manual_seed(settings.seed)
    optimizer = make_optimizer(model, settings)
    parts = [*first, *[splits.train] * settings.epochs]
    total = sum(math.ceil(len(part) / settings.batch_size) for part in parts)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: lr_factor(update, total))
    result = TrainingResult(
        majority_class=splits.test.labels.bincount().max().item() / len(splits.test),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        val_accuracy=-1.0,
    )
    best: dict[str, Tensor] = {}
    training_seconds, num_tokens = 0.0, 0
    start = time.perf_counter()
    for epoch, part in enumerate(parts, start=1 - len(first)):
        model.train()
        epoch_start = time.perf_counter()
        losses = []
        for ids, labels in batches(part, settings, order):
            if settings.axons_parity_probe and result.num_updates % settings.axons_parity_probe == 0:
                result.parity.append({"update": result.num_updates, **probe_parity(model, ids, labels, settings)})
            loss = nn.functional.cross_entropy(chunked_logits(model, ids, settings), labels)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise NonFiniteError(f"the loss became {losses[-1]} in epoch {epoch}; try a smaller lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
            scheduler.step()
            result.num_updates += 1
            on_update(result.num_updates, total, losses[-1])
        training_seconds += time.perf_counter() - epoch_start
        num_tokens += part.ids.numel()
        if epoch < 1:
            continue
        accuracy = accuracy_of(model, splits.val, settings)
        seconds = time.perf_counter() - start
        entry = {"loss": sum(losses) / len(losses), "val_accuracy": accuracy, "seconds": round(seconds, 2)}
        result.history.append(entry)
        on_epoch(epoch, entry)
        if accuracy > result.val_accuracy:
            result.val_accuracy, result.best_epoch = accuracy, epoch
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if accuracy >= settings.stop_at or (settings.max_seconds and seconds >= settings.max_seconds):
            break
    model.load_state_dict(best)
    result.test_accuracy = accuracy_of(model, splits.test, settings)
    result.seconds = round(time.perf_counter() - start, 2)
    result.tokens_per_second = round(num_tokens / training_seconds, 1)
    return result


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW with one group for the Axon recurrences and one for the rest."""
    axon: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (axon if name.rpartition(".")[2] in AXON_PARAMETERS else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": settings.weight_decay}]
    if axon:
        lr = settings.lr * settings.axon_lr_mult
        groups.append({"params": axon, "lr": lr, "weight_decay": settings.axon_weight_decay})
    return torch.optim.AdamW(groups, lr=settings.lr)


def lr_factor(update: int, total: int) -> float:
    """The share of the highest learning rate before ``update``, from 0."""
    warm_up = max(1, round(_WARM_UP * total))
    if update < warm_up:
        return (update + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (update - warm_up) / max(1, total - warm_up)))


def batches(
    task: SequenceTask, settings: TrainingSettings, order: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples once, shuffled by ``order`` if there is one."""
    rows = torch.arange(len(task)) if order is None else torch.randperm(len(task), generator=order)
    for some in rows.split(settings.batch_size):
        yield task.ids[some].to(settings.device), task.labels[some].to(settings.device)


@torch.no_grad()
def accuracy_of(model: SequenceClassifier, task: SequenceTask, settings: TrainingSettings) -> float:
    """The share of right answers."""
    model.eval()
    right = 0
    for ids, labels in batches(task, settings):
        right += int((chunked_logits(model, ids, settings).argmax(1) == labels).sum())
    return right / len(task)


def chunked_logits(model: SequenceClassifier, ids: Tensor, settings: TrainingSettings) -> Tensor:
    """Logits with gradients through the last chunk only; through everything without ``chunk_size``."""
    length, size = ids.shape[1], settings.chunk_size
    if size is None or size >= length:
        return model(ids)[0]
    state: MaybeState = None
    with torch.no_grad():
        for piece in ids[:, : length - size].split(size, dim=1):
            state = model(piece, state)[1]
    state = None if settings.reset_state_before_last_chunk else detach_state(state)
    if state is not None and settings.rtu_disable_traces_last_chunk:
        state = without_traces(state)
    return model(ids[:, length - size :], state)[0]


def without_traces(state: TensorDict) -> TensorDict:
    """The state with all carried sensitivities (keys that begin with ``E_``) at zero; the argument stays."""
    cleared = state.clone(recurse=False)
    for path in state.keys(include_nested=True, leaves_only=True):
        if (path if isinstance(path, str) else path[-1]).startswith("E_"):
            cleared[path] = torch.zeros_like(state[path])
    return cleared


def probe_parity(
    model: SequenceClassifier, ids: Tensor, labels: Tensor, settings: TrainingSettings
) -> dict[str, float]:
    """Compare the gradients of the Axon recurrences, chunked, with those of the whole sequence.

    Returns:
        ``max_relative_difference`` over the parameters, in the norm of each, and ``num_parameters``, how many there
        were.
    """
    named = [(name, p) for name, p in model.named_parameters() if name.rpartition(".")[2] in AXON_PARAMETERS]
    if not named:
        return {"max_relative_difference": 0.0, "num_parameters": 0}
    parameters = [parameter for _, parameter in named]

    def gradients(logits: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(nn.functional.cross_entropy(logits, labels), parameters, allow_unused=True)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        chunked = gradients(chunked_logits(model, ids, settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = gradients(model(ids)[0])
    differences = [
        ((part if part is not None else torch.zeros_like(full)) - full).norm().item() / (full.norm().item() or 1.0)
        for part, full in zip(chunked, whole, strict=True)
        if full is not None
    ]
    return {"max_relative_difference": max(differences, default=0.0), "num_parameters": len(named)}
