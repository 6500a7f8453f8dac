"""Dyck words: is a string of parentheses well formed?

0 is "(" and 1 is ")". A word is a random walk of ``num_pairs`` steps up and as many down that never goes below zero.
Half of the samples are words (label 1). In the other half one "(" and a later ")" change places so that the walk goes
below zero somewhere (label 0): the counts of both signs stay equal, and in all but about 2 % of the samples so do the
first and the last sign. Counting the whole string or looking at its ends does not help; the depth must be followed.

Let h_t be the depth behind token t. Exchanging "(" at i with ")" at j > i lowers h_i ... h_{j-1} by two, so the result
is ill formed exactly if one of these was below two.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from cognexis.tasks.sequence_task import SequenceTask, require

OPEN = 0
CLOSE = 1
_PICKY_ATTEMPTS = 100
# From 10 pairs on there are enough different words.
_EASIER = (0.2, 0.4)
_FEWEST_PAIRS = 10
_MOST_EASIER_SAMPLES = 5000


class Dyck(SequenceTask):
    """Well formed or not, over ``2 * num_pairs`` tokens."""

    name = "dyck"
    title = "check balanced parentheses"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        num_pairs: int = 50,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(num_pairs >= 1, "num_pairs", num_pairs, "must be at least 1")
        self.num_pairs, self.length = num_pairs, 2 * num_pairs
        self.vocab_size, self.num_classes = 2, 2
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    @classmethod
    def easier(cls, num_samples: int, *, seed: int, **difficulty: Any) -> list[SequenceTask]:
        """A fifth and two fifths of the pairs, as far as these are 10 or more; at most 5000 samples."""
        num_pairs = difficulty.get("num_pairs", cls.difficulty()["num_pairs"])
        sizes = [size for share in _EASIER if (size := round(share * num_pairs)) >= _FEWEST_PAIRS]
        count = min(num_samples, _MOST_EASIER_SAMPLES)
        return [cls(count, num_pairs=size, seed=(seed + size) % 2**63) for size in sizes]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        words = draw_words(count, self.num_pairs, generator)
        labels = torch.randint(2, (count,), generator=generator)
        return torch.where(labels[:, None] == 1, words, break_words(words, generator)), labels


def draw_words(count: int, num_pairs: int, generator: torch.Generator) -> Tensor:
    """Well-formed words ``[count, 2 * num_pairs]``: each sign is drawn evenly where both are possible."""
    coins = torch.rand(count, 2 * num_pairs, generator=generator) < 0.5
    ids = torch.empty(count, 2 * num_pairs, dtype=torch.int64)
    depth = torch.zeros(count, dtype=torch.int64)
    num_open = torch.zeros(count, dtype=torch.int64)
    for t in range(2 * num_pairs):
        must_open, must_close = depth == 0, num_open == num_pairs
        is_open = must_open | (coins[:, t] & ~must_close)
        ids[:, t] = torch.where(is_open, OPEN, CLOSE)
        depth += torch.where(is_open, 1, -1)
        num_open += is_open
    return ids


def depths(ids: Tensor) -> Tensor:
    """The depth behind each token, ``[S, T]``."""
    return torch.where(ids == OPEN, 1, -1).cumsum(1)


def break_words(words: Tensor, generator: torch.Generator) -> Tensor:
    """Exchange one "(" and a later ")" in each word so that it becomes ill formed.

    The first and the last sign, which would give the answer away, stay unless many attempts find nothing else;
    exchanging just these two breaks every word, so the search ends.
    """
    broken = words.clone()
    pending = torch.arange(len(words))
    for attempt in itertools.count():
        some = words[pending]
        rows = torch.arange(len(some))
        i = _random_position(some == OPEN, generator)
        j = _random_position(some == CLOSE, generator)
        some[rows, i], some[rows, j] = CLOSE, OPEN
        is_good = (i < j) & (depths(some) < 0).any(1)
        if attempt < _PICKY_ATTEMPTS:
            is_good &= (some[:, 0] == OPEN) & (some[:, -1] == CLOSE)
        broken[pending[is_good]] = some[is_good]
        pending = pending[~is_good]
        if not len(pending):
            break
    return broken


def _random_position(allowed: Tensor, generator: torch.Generator) -> Tensor:
    """One of the allowed columns of each row, evenly."""
    return torch.where(allowed, torch.rand(allowed.shape, generator=generator), -1.0).argmax(1)
