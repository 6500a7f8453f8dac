"""What loading costs and how much is waiting; the numbers that say whether the model waits for data."""

from dataclasses import dataclass


@dataclass
class LoaderMetrics:
    """Counters of one loader since it was made.

    Attributes:
        batches: batches handed out.
        rows: rows handed out.
        load_seconds: time spent on reading and collating those batches, in whatever process did it.
        wait_seconds: time that the consumer waited for them.
        queue_depth: finished batches that waited when the last one was taken.
        max_queue_depth: the most that ever waited.
    """

    batches: int = 0
    rows: int = 0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0
    queue_depth: int = 0
    max_queue_depth: int = 0

    def taken(self, num_rows: int, load_seconds: float, wait_seconds: float, queue_depth: int) -> None:
        """Count one batch."""
        self.batches += 1
        self.rows += num_rows
        self.load_seconds += load_seconds
        self.wait_seconds += wait_seconds
        self.queue_depth = queue_depth
        self.max_queue_depth = max(self.max_queue_depth, queue_depth)

    def as_dict(self, prefix: str = "data/") -> dict[str, float]:
        """For a log: latencies are means over all batches, in milliseconds."""
        count = max(1, self.batches)
        return {
            f"{prefix}batches": self.batches,
            f"{prefix}load_ms": 1e3 * self.load_seconds / count,
            f"{prefix}wait_ms": 1e3 * self.wait_seconds / count,
            f"{prefix}queue_depth": self.queue_depth,
        }
