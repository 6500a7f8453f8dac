"""Prefix sums: what is the running sum, modulo m, behind the last number?

    label = (x_1 + ... + x_n) mod m                    x_t are 0 ... m - 1 with equal chance

Every prefix has to be summed before the next number can be added, or the numbers have to be added as a tree; a model
that cannot do either is at chance, 1 / m, since the last number makes every answer equally likely. With m = 2 it is
the parity of bits. Source: A. Schwarzschild et al., Can You Learn an Algorithm? Generalizing from Easy to Hard
Problems with Recurrent Networks, 2021, with m = 2 and an answer for every prefix.
"""

import torch
from torch import Tensor

from cognexis.tasks.sequence_task import SequenceTask, require


class PrefixSums(SequenceTask):
    """Add ``length`` numbers modulo ``modulus``."""

    name = "prefix_sums"
    title = "add up numbers modulo m"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        length: int = 24,
        modulus: int = 10,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(length >= 1, "length", length, "must be at least 1")
        require(modulus >= 2, "modulus", modulus, "must be at least 2")
        self.length, self.modulus = length, modulus
        self.vocab_size, self.num_classes = modulus, modulus
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = torch.randint(self.modulus, (count, self.length), generator=generator)
        return ids, ids.sum(1) % self.modulus
