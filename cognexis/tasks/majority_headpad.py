"""Majority with an empty tail: the counts must survive until the end.

As ``Majority`` in the first ``length - tail`` tokens; the last ``tail`` tokens are 0.
"""

import torch
from torch import Tensor

from cognexis.tasks.majority import draw_votes, majority_labels
from cognexis.tasks.sequence_task import SequenceTask, require, require_chance


class MajorityHeadPad(SequenceTask):
    """Compare two counts, ``tail`` steps after the last vote."""

    name = "majority_headpad"
    title = "compare two counts, asked late"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        length: int = 1024,
        tail: int = 256,
        p_nonzero: float = 0.3,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(length >= 2, "length", length, "must be at least 2")
        require(0 <= tail < length, "tail", tail, f"must be between 0 and length - 1 = {length - 1}")
        require_chance("p_nonzero", p_nonzero)
        self.length, self.tail, self.p_nonzero = length, tail, p_nonzero
        self.vocab_size, self.num_classes = 3, 2
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        votes = draw_votes(count, self.length - self.tail, self.p_nonzero, generator)
        ids = torch.cat([votes, votes.new_zeros(count, self.tail)], dim=1)
        return ids, majority_labels(ids)
