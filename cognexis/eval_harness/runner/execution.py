"""What the requests of one task gave and took at one depth or in one loop mode."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cognexis.eval_harness.compute import StageFlops

NO_FLOPS = StageFlops(0, 0, 0, 0)


@dataclass
class Execution:
    """Answers and costs.

    Attributes:
        predictions: of the examples, in their order.
        batch_ms: milliseconds of every batch; a request takes as long as its batch.
        prefill_ms: likewise, until the first new token.
        decode_ms: milliseconds of every batch for each token after the first.
        batch_size: requests, or sequences of choices, that ran together.
        num_requests: requests that were run.
        num_tokens: tokens that were scored, or generated.
        loops: loops of every token that was scored or generated; of requests at fixed depth one number each.
        halts: why loops stopped, by reason, counted like ``loops``.
        flops: matrix operations of all requests.
        elementwise: elementwise operations of all requests; None where they are not counted.
        exhausted: requests that ended for lack of budget.
        violations: requests that ran more loops than their budget allows.
        cache_bytes: largest cache of a batch, divided by its requests.
        norms: mean norm of the state by loop; empty where it is not measured.
        peak_memory_bytes: see ``memory``.
        overhead_ms: of the scheduler, all requests together.
    """

    predictions: list[Any] = field(default_factory=list)
    batch_ms: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    batch_size: int = 1
    num_requests: int = 0
    num_tokens: int = 0
    loops: list[int] = field(default_factory=list)
    halts: Counter[str] = field(default_factory=Counter)
    flops: StageFlops = NO_FLOPS
    elementwise: float | None = 0.0
    exhausted: int = 0
    violations: int = 0
    cache_bytes: int = 0
    norms: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    overhead_ms: float = 0.0

    def histogram(self) -> list[int]:
        """Entries of ``loops`` by number, from 0."""
        counts = Counter(self.loops)
        return [counts[number] for number in range(max(counts, default=0) + 1)]


class Deadline:
    """The time that a run may take.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def require(self, done: int, total: int) -> None:
        """Raise a TimeoutError when it is over."""
        if time.monotonic() > self._end:
            raise TimeoutError(f"no end after {self.seconds:g} seconds, at {done} of {total} requests")


def batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    """Consecutive parts of ``size`` items."""
    return (items[start : start + size] for start in range(0, len(items), size))
