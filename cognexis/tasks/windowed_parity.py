"""Windowed parity: is the number of ones up to here odd?

    ids      = BOS x_1 x_2 ... x_n                     bits x_t are 0 or 1 with equal chance
    labels_t = (x_1 + ... + x_t) mod 2,  labels_0 = -100

The window is that of a model: where attention reaches back over W tokens, one block moves information by W - 1
positions at most, so the answer at position t needs at least ``fewest_loops(t, W)`` loops of one core block between
one prelude and one coda block. With fewer loops no model does better than chance there. That makes the task a measure
of depth: the loops a position needs are known beforehand and grow with the length, and rows longer than any training
row ask whether more loops help beyond training.

The row begins with BOS, because attention averages: without it "1" and "11" look alike. Labels stand at the position
of their bit, so a model is trained with ``shift_labels=labels``.
Letters: S samples, T = n + 1 tokens.
"""

import torch
from torch import Tensor

from cognexis.tasks.sequence_task import SequenceTask, require

BOS, PAD = 2, 3
IGNORED_LABEL = -100
VOCAB_SIZE = 4


class WindowedParity(SequenceTask):
    """Distinct rows of ``num_bits`` bits behind BOS.

    Unlike the tasks in the table of tasks it has a label at every position: ``labels`` is ``[S, T]``.
    """

    name = "windowed_parity"
    title = "parity of every prefix"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        num_bits: int = 24,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(num_bits >= 1, "num_bits", num_bits, "must be at least 1")
        self.num_bits, self.length = num_bits, num_bits + 1
        self.vocab_size, self.num_classes = VOCAB_SIZE, 2
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return draw_rows(count, self.num_bits, generator)


def draw_rows(count: int, num_bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and labels ``[count, num_bits + 1]``; rows may repeat."""
    bits = torch.randint(2, (count, num_bits), generator=generator)
    ids = torch.nn.functional.pad(bits, (1, 0), value=BOS)
    labels = torch.nn.functional.pad(bits.cumsum(1) % 2, (1, 0), value=IGNORED_LABEL)
    return ids, labels


def fewest_loops(position: int, window: int, num_other_blocks: int = 2) -> int:
    """Loops after which the answer at bit ``position`` (from 1) can depend on the first bit, at least 1.

    Args:
        position: t; the first bit stands t - 1 tokens before it.
        window: W, tokens that one attention sees, the own one included; at least 2.
        num_other_blocks: blocks of prelude and coda, which move information once each.

    Raises:
        InvalidConfigError: an argument is out of range.
    """
    require(position >= 1, "position", position, "must be at least 1")
    require(window >= 2, "window", window, "must be at least 2, or nothing moves")
    require(num_other_blocks >= 0, "num_other_blocks", num_other_blocks, "must not be negative")
    blocks = -(-(position - 1) // (window - 1))
    return max(1, blocks - num_other_blocks)
