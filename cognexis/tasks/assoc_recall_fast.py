"""Associative recall: which value stood behind this key?

Token 0 is filler, the last ``num_values`` tokens of the vocabulary are values, all others keys. ``num_pairs`` distinct
keys, each followed at once by its value, are scattered over the first ``length - tail`` tokens; the last token repeats
one of the keys.

    label = id of the value behind that key, counted from the first value
"""

import torch
from torch import Tensor

from cognexis.tasks.sequence_task import SequenceTask, require


class AssocRecall(SequenceTask):
    """Look up one of ``num_pairs`` pairs, at least ``tail`` steps after the last of them."""

    name = "assoc_recall_fast"
    title = "look up a value by its key"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        length: int = 384,
        tail: int = 128,
        num_pairs: int = 8,
        vocab_size: int = 1024,
        num_values: int = 256,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(num_pairs >= 1, "num_pairs", num_pairs, "must be at least 1")
        require(tail >= 1, "tail", tail, "must be at least 1: the last token is the question")
        require(length - tail >= 2 * num_pairs, "length", length, f"must be at least {2 * num_pairs + tail}")
        require(num_values >= 2, "num_values", num_values, "must be at least 2")
        least = 1 + num_pairs + num_values
        require(vocab_size >= least, "vocab_size", vocab_size, f"must be at least {least}")
        self.length, self.tail, self.num_pairs = length, tail, num_pairs
        self.vocab_size, self.num_classes = vocab_size, num_values
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    @property
    def first_value(self) -> int:
        """The lowest id of a value."""
        return self.vocab_size - self.num_classes

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pairs = self.num_pairs
        keys = 1 + torch.rand(count, self.first_value - 1, generator=generator).argsort(1)[:, :pairs]
        values = torch.randint(self.num_classes, (count, pairs), generator=generator)
        # Choose places among the positions that remain when every pair is shrunk to one, then spread them again.
        slots = torch.rand(count, self.length - self.tail - pairs, generator=generator).argsort(1)[:, :pairs]
        places = slots.sort(1).values + torch.arange(pairs)
        ids = torch.zeros(count, self.length, dtype=torch.int64)
        ids.scatter_(1, places, keys).scatter_(1, places + 1, values + self.first_value)
        asked = torch.randint(pairs, (count, 1), generator=generator)
        ids[:, -1:] = keys.gather(1, asked)
        return ids, values.gather(1, asked)[:, 0]
