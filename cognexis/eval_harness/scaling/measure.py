"""One depth of one model on rows: likelihood, accuracy and entropy of the predictions, time, and the state by loop.

The clock of the timeout is looked at after every loop, so a run that is too deep ends soon after its time is over.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import NonFiniteError
from cognexis.eval_harness.compute import LatencySummary, latency_summary

IGNORED_LABEL = -100


@dataclass(frozen=True)
class DepthMeasurement:
    """What one depth gave.

    Attributes:
        losses: mean nats per token of each row.
        accuracies: share of right tokens of each row.
        latency: milliseconds of a forward pass over a batch.
        tokens_per_second: of the forward passes.
        norms: mean norm of the state by loop, entry 0 before the first.
        deltas: mean relative change of the state by loop; the first is None.
        peak_memory_bytes: of the device; None on a CPU.
        entropy: mean entropy of the predictions that are scored, in nats.
    """

    losses: list[float]
    accuracies: list[float]
    latency: LatencySummary
    tokens_per_second: float
    norms: list[float]
    deltas: list[float | None]
    peak_memory_bytes: int | None
    entropy: float


class StateWatch:
    """Relative changes of the state, by a hook on the place where every loop ends."""

    def __init__(self, model: Any) -> None:
        self.changes: list[float | None] = []
        self._last: Tensor | None = None
        self._handle = model.model.recurrent.loop_state.register_forward_hook(self._see)

    def _see(self, module: Any, inputs: Any, state: Tensor) -> None:
        if self._last is None or self._last.shape != state.shape:
            self.changes.append(None)
        else:
            change = (state - self._last).norm(dim=-1) / self._last.norm(dim=-1).clamp_min(1e-12)
            self.changes.append(float(change.mean()))
        self._last = state

    def take(self) -> list[float | None]:
        """The changes since the last call."""
        found, self.changes, self._last = self.changes, [], None
        return found

    def close(self) -> None:
        self._handle.remove()


@contextmanager
def time_limited(model: Any, seconds: float) -> Iterator[None]:
    """Let whatever ``model`` runs inside end after the loop in which its time is over.

    Raises:
        TimeoutError: it did.
    """
    deadline = time.monotonic() + seconds

    def look(*_: Any) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no end after {seconds:g} seconds")

    handle = model.model.recurrent.loop_state.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def measure_depth(
    model: Any,
    rows: Tensor,
    num_loops: int,
    *,
    batch_size: int,
    timeout_s: float = 600.0,
    labels: Tensor | None = None,
) -> DepthMeasurement:
    """Measure a model at one depth; the first batch runs once before the clock of the latency does.

    Args:
        rows: ``[R, T + 1]`` token ids, of which each is predicted from those before it; with labels ``[R, T]``.
        timeout_s: seconds for all rows together.
        labels: ``[R, T]`` answers at their own positions; -100 where there is none.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
        TimeoutError: time is over.
    """
    options = {"num_loops": num_loops, "allow_extrapolation": True, "use_cache": False, "return_loop_stats": True}
    inputs, answers = (rows[:, :-1], rows[:, 1:]) if labels is None else (rows, labels)
    batches = [
        (some.to(model.device), right.to(model.device))
        for some, right in zip(inputs.split(batch_size), answers.split(batch_size), strict=True)
    ]
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    losses: list[float] = []
    accuracies: list[float] = []
    entropies: list[float] = []
    times: list[float] = []
    norms, deltas = torch.zeros(num_loops + 1, dtype=torch.float64), torch.zeros(num_loops, dtype=torch.float64)
    watch = StateWatch(model)
    try:
        with time_limited(model, timeout_s):
            model(input_ids=batches[0][0], **options)
            for ids, targets in batches:
                watch.take()
                started = time.perf_counter()
                output = model(input_ids=ids, **options)
                if is_cuda:
                    torch.cuda.synchronize(model.device)
                times.append(1e3 * (time.perf_counter() - started))
                log_probs = output.logits.float().log_softmax(-1)
                counts = targets != IGNORED_LABEL
                nats = torch.nn.functional.nll_loss(log_probs.transpose(1, 2), targets, reduction="none")
                if not torch.isfinite(nats).all():
                    wrong = int((~torch.isfinite(nats)).sum())
                    raise NonFiniteError(f"{wrong} of {int(counts.sum())} losses are not finite")
                losses += _row_means(nats, counts)
                accuracies += _row_means(log_probs.argmax(-1) == targets, counts)
                entropies += _row_means(-(log_probs.exp() * log_probs.clamp_min(-1e30)).sum(-1), counts)
                norms += len(ids) / len(rows) * output.loop_diagnostics.norms.double().cpu()
                changes = [0.0 if change is None else change for change in watch.take()]
                deltas += len(ids) / len(rows) * torch.tensor(changes, dtype=torch.float64)
    except TimeoutError as error:
        raise TimeoutError(f"{error}, at {len(losses)} of {len(rows)} rows") from None
    finally:
        watch.close()
    return DepthMeasurement(
        losses=losses,
        accuracies=accuracies,
        latency=latency_summary(times),
        tokens_per_second=inputs.numel() / (sum(times) / 1e3),
        norms=norms.tolist(),
        deltas=[None, *deltas.tolist()[1:]],
        peak_memory_bytes=torch.cuda.max_memory_allocated(model.device) if is_cuda else None,
        entropy=sum(entropies) / len(entropies),
    )


def _row_means(values: Tensor, counts: Tensor) -> list[float]:
    """Means ``[R]`` over the positions that count, of which each row has one or more."""
    return (values.double().where(counts, 0.0).sum(1) / counts.sum(1)).tolist()
