"""p-hop: follow ``num_hops`` links back through a sequence.

    find(i) = the largest j <= i with x_{j-1} = x_i          one hop: to the token behind the latest earlier x_i
    label   = x at find(find(... find(T)))                   p hops from the last token

One hop is what an induction head does; p hops need p of them one after another, or a depth of about log2 p where hops
are doubled. Neighbours differ, since a repeated token would be a hop to itself, and sequences whose p-th hop does not
exist are drawn again, so every sequence has an answer. Source: C. Sanford, D. Hsu, M. Telgarsky, Transformers,
Parallel Computation, and Logarithmic Depth, 2024, where the missing hop has an answer of its own.
Letters: S samples, T time.
"""

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError
from cognexis.tasks.sequence_task import SequenceTask, require

_MAX_ROUNDS = 200


class PHop(SequenceTask):
    """``num_hops`` hops in ``length`` tokens of an alphabet of ``num_symbols``."""

    name = "p_hop"
    title = "follow links through a sequence"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        num_hops: int = 4,
        length: int = 64,
        num_symbols: int = 4,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(num_hops >= 1, "num_hops", num_hops, "must be at least 1")
        require(num_symbols >= 3, "num_symbols", num_symbols, "must be at least 3, or neighbours decide each other")
        require(length >= 2 * num_hops + 1, "length", length, f"must be at least {2 * num_hops + 1}")
        self.num_hops, self.length = num_hops, length
        self.vocab_size, self.num_classes = num_symbols, num_symbols
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        found_ids: list[Tensor] = []
        found_labels: list[Tensor] = []
        missing = count
        for _ in range(_MAX_ROUNDS):
            ids = draw_without_repeats(count, self.length, self.vocab_size, generator)
            places = hop(ids, self.num_hops)
            good = (places > 0).nonzero()[:missing, 0]
            found_ids.append(ids[good])
            found_labels.append(ids[good].gather(1, places[good, None])[:, 0])
            missing -= len(good)
            if not missing:
                return torch.cat(found_ids), torch.cat(found_labels)
        raise InvalidConfigError(
            f"num_hops={self.num_hops}: too few sequences of {self.length} tokens have so many hops; raise length",
            path="num_hops",
            value=self.num_hops,
        )


def draw_without_repeats(count: int, length: int, num_symbols: int, generator: torch.Generator) -> Tensor:
    """Ids ``[count, length]`` in which neighbours differ, all such sequences with equal chance."""
    steps = torch.randint(1, num_symbols, (count, length), generator=generator)
    steps[:, 0] = torch.randint(num_symbols, (count,), generator=generator)
    return steps.cumsum(1) % num_symbols


def hop(ids: Tensor, num_hops: int) -> Tensor:
    """Place ``[S]`` of the ``num_hops``-th hop from the last token of ``ids`` ``[S, T]``; 0 where there is none."""
    time = torch.arange(ids.shape[1])
    places = torch.full((len(ids), 1), ids.shape[1] - 1)
    for _ in range(num_hops):
        symbol = ids.gather(1, places)
        is_link = (ids == symbol) & (time + 1 <= places)
        places = torch.where(is_link, time + 1, 0).amax(1, keepdim=True)
    return places[:, 0]
