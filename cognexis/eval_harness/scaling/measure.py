"""One depth of one model on rows of text: likelihood, accuracy of the next token, time, and the state by loop."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import NonFiniteError
from cognexis.eval_harness.compute import LatencySummary, latency_summary


@dataclass(frozen=True)
class DepthMeasurement:
    """What one depth gave.

    Attributes:
        losses: mean nats per token of each row.
        accuracies: share of right next tokens of each row.
        latency: milliseconds of a forward pass over a batch.
        tokens_per_second: of the forward passes.
        norms: mean norm of the state by loop, entry 0 before the first.
        deltas: mean relative change of the state by loop; the first is None.
        peak_memory_bytes: of the device; None on a CPU.
    """

    losses: list[float]
    accuracies: list[float]
    latency: LatencySummary
    tokens_per_second: float
    norms: list[float]
    deltas: list[float | None]
    peak_memory_bytes: int | None


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


@torch.no_grad()
def measure_depth(
    model: Any, rows: Tensor, num_loops: int, *, batch_size: int, timeout_s: float = 600.0
) -> DepthMeasurement:
    """Measure a model at one depth; the first batch runs once before the clock does.

    Args:
        rows: ``[R, T + 1]`` token ids.
        timeout_s: seconds for all rows together.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
        TimeoutError: time is over.
    """
    options = {"num_loops": num_loops, "allow_extrapolation": True, "use_cache": False, "return_loop_stats": True}
    batches = [batch.to(model.device) for batch in rows.split(batch_size)]
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    model(input_ids=batches[0][:, :-1], **options)
    watch, deadline = StateWatch(model), time.monotonic() + timeout_s
    losses: list[float] = []
    accuracies: list[float] = []
    times: list[float] = []
    norms, deltas = torch.zeros(num_loops + 1, dtype=torch.float64), torch.zeros(num_loops, dtype=torch.float64)
    try:
        for batch in batches:
            watch.take()
            started = time.perf_counter()
            output = model(input_ids=batch[:, :-1], **options)
            if is_cuda:
                torch.cuda.synchronize(model.device)
            times.append(1e3 * (time.perf_counter() - started))
            logits, targets = output.logits.float(), batch[:, 1:]
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            losses += nats.double().mean(dim=1).tolist()
            accuracies += (logits.argmax(-1) == targets).double().mean(dim=1).tolist()
            if not torch.isfinite(nats).all():
                raise NonFiniteError(f"{int((~torch.isfinite(nats)).sum())} of {nats.numel()} losses are not finite")
            norms += len(batch) / len(rows) * output.loop_diagnostics.norms.double().cpu()
            changes = [0.0 if change is None else change for change in watch.take()]
            deltas += len(batch) / len(rows) * torch.tensor(changes, dtype=torch.float64)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end after {timeout_s:g} seconds, at {len(losses)} of {len(rows)} rows")
    finally:
        watch.close()
    num_tokens = rows.shape[0] * (rows.shape[1] - 1)
    return DepthMeasurement(
        losses=losses,
        accuracies=accuracies,
        latency=latency_summary(times),
        tokens_per_second=num_tokens / (sum(times) / 1e3),
        norms=norms.tolist(),
        deltas=[None, *deltas.tolist()[1:]],
        peak_memory_bytes=torch.cuda.max_memory_allocated(model.device) if is_cuda else None,
    )
