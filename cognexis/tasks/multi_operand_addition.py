"""Multi-operand addition: the sum of several numbers that are written in digits.

    ids   = digits of a_1 PLUS digits of a_2 PLUS ... digits of a_k EQUALS         most significant digit first
    label = a_1 + ... + a_k

Every operand has ``num_digits`` digits, leading zeros included, all with equal chance. Carries of k operands are up to
k - 1 and chain through all digits, so both numbers make it harder. The label is the sum itself, of
k (10^digits - 1) + 1 values.
"""

import torch
from torch import Tensor

from cognexis.tasks.sequence_task import SequenceTask, require

PLUS, EQUALS = 10, 11


class MultiOperandAddition(SequenceTask):
    """Add ``num_operands`` numbers of ``num_digits`` digits."""

    name = "multi_operand_addition"
    title = "add several numbers digit by digit"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        num_operands: int = 3,
        num_digits: int = 3,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(num_operands >= 2, "num_operands", num_operands, "must be at least 2")
        require(1 <= num_digits <= 15, "num_digits", num_digits, "must be 1 to 15")
        self.num_operands, self.num_digits = num_operands, num_digits
        self.length = num_operands * (num_digits + 1)
        self.vocab_size, self.num_classes = 12, num_operands * (10**num_digits - 1) + 1
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        digits = torch.randint(10, (count, self.num_operands, self.num_digits), generator=generator)
        signs = torch.full((count, self.num_operands, 1), PLUS)
        signs[:, -1] = EQUALS
        powers = 10 ** torch.arange(self.num_digits - 1, -1, -1)
        return torch.cat([digits, signs], dim=2).flatten(1), (digits * powers).sum((1, 2))
