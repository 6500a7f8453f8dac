"""What a batch says about loops: bounds, the count that was drawn, and what is to be recorded.

The metadata belong to a step and are attached before the forward pass. They must be equal on all ranks: make them from
(seed, step) alone and nothing of the rank enters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cognexis.errors import InvalidConfigError

METADATA_KEY = "loop_metadata"
_MOST_LOOPS = 65_536


@dataclass(frozen=True)
class LoopMetadata:
    """Loops of one batch.

    Attributes:
        min_loops: smallest count that may run.
        max_loops: largest count that may run.
        sampled_loops: the count that this batch runs, or one for each row; None leaves it to the model.
        retain_intermediate: keep the states after every loop.
        scheduler_targets: what a scheduler is to learn from this batch, by name.
        difficulty: of the batch, or one for each row.
        tags: names of tasks, of the batch or one for each row.
    """

    min_loops: int
    max_loops: int
    sampled_loops: int | tuple[int, ...] | None = None
    retain_intermediate: bool = False
    scheduler_targets: Mapping[str, Any] = field(default_factory=dict)
    difficulty: float | tuple[float, ...] | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("min_loops", self.min_loops, 1, _MOST_LOOPS)
        _check("max_loops", self.max_loops, self.min_loops, _MOST_LOOPS)
        sampled = self.sampled_loops if isinstance(self.sampled_loops, tuple) else (self.sampled_loops,)
        for value in sampled:
            if value is not None:
                _check("sampled_loops", value, self.min_loops, self.max_loops)


def attach_loop_metadata(batch: Mapping[str, Any], metadata: LoopMetadata) -> dict[str, Any]:
    """The batch with its metadata under ``loop_metadata``; the trainer takes them off before the forward pass.

    Raises:
        InvalidConfigError: metadata for each row that are not as many as the rows.
    """
    num_rows = len(batch["input_ids"])
    for name in ("sampled_loops", "difficulty"):
        value = getattr(metadata, name)
        if isinstance(value, tuple) and len(value) != num_rows:
            raise InvalidConfigError(f"{name}: {len(value)} values for a batch of {num_rows} rows", path=name)
    return {**batch, METADATA_KEY: metadata}


def _check(name: str, value: Any, lowest: int, highest: int) -> None:
    if type(value) is not int or not lowest <= value <= highest:
        raise InvalidConfigError(
            f"{name}={value!r}: must be a whole number from {lowest} to {highest}", path=name, value=value
        )
