"""Majority: which of two symbols occurred more often?

Each position is non-zero with chance ``p_nonzero``, and then 1 or 2 with equal chance.

    label = 1 if #1 > #2 else 0        (a tie is 0)

A tie happens in about 7 % of the sequences at the default length, so the larger class is label 0 with about 54 %.
"""

import torch
from torch import Tensor

from cognexis.tasks.sequence_task import SequenceTask, require, require_chance


class Majority(SequenceTask):
    """Compare two counts over ``length`` tokens."""

    name = "majority"
    title = "compare two counts"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        length: int = 100,
        p_nonzero: float = 0.3,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(length >= 1, "length", length, "must be at least 1")
        require_chance("p_nonzero", p_nonzero)
        self.length, self.p_nonzero = length, p_nonzero
        self.vocab_size, self.num_classes = 3, 2
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = draw_votes(count, self.length, self.p_nonzero, generator)
        return ids, majority_labels(ids)


def draw_votes(count: int, length: int, p_nonzero: float, generator: torch.Generator) -> Tensor:
    """Ids ``[count, length]`` of 0, 1 and 2."""
    votes = torch.randint(1, 3, (count, length), generator=generator)
    return torch.where(torch.rand(count, length, generator=generator) < p_nonzero, votes, 0)


def majority_labels(ids: Tensor) -> Tensor:
    """1 where token 1 is more frequent than token 2."""
    return ((ids == 1).sum(1) > (ids == 2).sum(1)).long()
