"""Schedulers whose answers the test chooses: depths from a table, and random ones that keep to no rule."""

from typing import Any

import torch
from torch import Tensor

from cognexis.looping.schedulers.base import HALT_REASONS, LoopDecision, LoopObservation, LoopScheduler, reason_code


class ByTable(LoopScheduler):
    """Stops each token of a text at its own depth, whatever it measures.

    Args:
        depths: ``[B, tokens]`` of the whole text; every pass takes the next columns.
        start: tokens that earlier calls have read.
    """

    name = "by_table"
    signals = frozenset({"hidden_delta"})  # so that the slots are tokens

    def __init__(self, depths: Tensor, start: int = 0) -> None:
        self.depths, self.start, self._end = depths, start, start

    def observe(self, observation: LoopObservation) -> LoopDecision:
        if observation.loops == 1:
            self.start, self._end = self._end, self._end + observation.shape[1]
        halt = observation.loops >= self.depths[:, self.start : self._end]
        return LoopDecision(halt, torch.full_like(halt, reason_code("value_gain"), dtype=torch.int8))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.name}


class Rogue(LoopScheduler):
    """Answers at random: stops everything or nothing, and gives reasons that only hard rules may give.

    Attributes:
        shown: the observations, in order.
    """

    name = "rogue"

    def __init__(self, seed: int, by_token: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.by_token = by_token
        self.shown: list[LoopObservation] = []

    @property
    def signals(self) -> frozenset[str]:
        return frozenset({"hidden_delta"} if self.by_token else ())

    def observe(self, observation: LoopObservation) -> LoopDecision:
        self.shown.append(observation)
        share = torch.rand((), generator=self.generator) ** 3
        halt = torch.rand(observation.shape, generator=self.generator) < share
        reasons = torch.randint(-3, len(HALT_REASONS) + 4, observation.shape, generator=self.generator)
        return LoopDecision(halt, reasons.to(torch.int8))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.name}
