"""Two needles: is the number of ones even or odd?

Zeros, with two ones, and a third with chance one half, at distinct random positions of the first ``length - tail``
tokens; the label is the parity of their number.
"""

import torch
from torch import Tensor

from cognexis.tasks.sequence_task import SequenceTask, require


class TwoNeedleXor(SequenceTask):
    """Parity of two or three needles, ``tail`` steps after the last possible one."""

    name = "two_needle_xor_fast"
    title = "parity of rare events"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        length: int = 256,
        tail: int = 64,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(length >= 3, "length", length, "must be at least 3")
        require(0 <= tail <= length - 3, "tail", tail, f"must leave three positions: at most {length - 3}")
        self.length, self.tail = length, tail
        self.vocab_size, self.num_classes = 2, 2
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        places = torch.rand(count, self.length - self.tail, generator=generator).argsort(1)[:, :3]
        labels = torch.randint(2, (count,), generator=generator)
        ones = torch.ones_like(places)
        ones[:, 2] = labels
        return torch.zeros(count, self.length, dtype=torch.int64).scatter_(1, places, ones), labels
