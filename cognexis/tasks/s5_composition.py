"""Composition in S5: which permutation of five things do these permutations make, one after another?

    label = index of  p_T o ... o p_2 o p_1             p_1 is applied first; each is one of the 120 elements

S5 is the smallest symmetric group that is not solvable, so its word problem is complete for the class NC1: a network
of constant depth cannot solve it at all lengths (unless TC0 = NC1), and a looped one can with a number of loops that
grows with log T. A permutation p is the tuple (p(1), ..., p(5)); the element of index i is the i-th of these in
lexicographic order, so 0 is the identity. Source: D. Barrington, Bounded-width polynomial-size branching programs
recognize exactly those languages in NC1, 1989; W. Merrill, J. Petty, A. Sabharwal, The Illusion of State in
State-Space Models, 2024.
"""

import itertools

import torch
from torch import Tensor

from cognexis.tasks.sequence_task import SequenceTask, require

PERMUTATIONS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(1, 6)))
_TABLE = torch.tensor(PERMUTATIONS) - 1  # [120, 5]
_PLACES = 5 ** torch.arange(4, -1, -1)
_INDEX = torch.zeros(5**5, dtype=torch.int64).index_put_(((_TABLE * _PLACES).sum(1),), torch.arange(120))


class S5Composition(SequenceTask):
    """Compose ``length`` permutations of five things."""

    name = "s5_composition"
    title = "compose permutations of five things"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        length: int = 8,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(length >= 1, "length", length, "must be at least 1")
        self.length, self.vocab_size, self.num_classes = length, 120, 120
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = torch.randint(120, (count, self.length), generator=generator)
        return ids, compose(ids)


def compose(ids: Tensor) -> Tensor:
    """Index ``[S]`` of the permutation that those of ``ids`` ``[S, T]`` make, the first applied first."""
    image = _TABLE[ids[:, 0]]
    for t in range(1, ids.shape[1]):
        image = _TABLE[ids[:, t]].gather(1, image)
    return _INDEX[(image * _PLACES).sum(1)]
