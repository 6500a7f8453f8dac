"""Which tokens still take part in the loops, how many they ran and why they stopped.

    h = where(active, R(h), h)          loops = loops + active          active = active & ~halt

A token that stopped never starts again; its state stays as it is and stays visible. A rule that looks at one token
alone is deceived by a token whose evidence has not arrived yet, which looks settled. Three dependencies say whose
agreement a token needs before a rule may stop it:

    token     nobody's: sound where a token reads finished states of all earlier ones
    prefix    every token before it is settled too, or has stopped: sound in a causal model, for any length
    row       every token of its row: sound, but later tokens decide about earlier ones, so it is not causal

With the exact cache, loop t of a new token reads what earlier tokens were after t loops, so "token" can be deceived
in decoding too; under "prefix" a new token runs at least as many loops as the deepest token before it, whether that
one belongs to the same call or to an earlier one, and cutting a sequence into calls changes no decision.

Letters: B rows, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cognexis.looping.schedulers.base import reason_code

HALT_DEPENDENCIES = ("token", "prefix", "row")


@dataclass
class HaltState:
    """The token-wise state of a run.

    Attributes:
        active: bool ``[B, T]``.
        loops: int64 ``[B, T]`` loops run.
        reasons: int8 ``[B, T]`` codes of the halt reasons, 0 while a token runs.
    """

    active: Tensor
    loops: Tensor
    reasons: Tensor

    @classmethod
    def begin(cls, takes_part: Tensor) -> "HaltState":
        """All of ``takes_part`` ``[B, T]`` runs; padding and ended rows are stopped from the start as "forced"."""
        forced = torch.full(takes_part.shape, reason_code("forced"), dtype=torch.int8, device=takes_part.device)
        return cls(
            takes_part.clone(), torch.zeros_like(takes_part, dtype=torch.long), forced.masked_fill(takes_part, 0)
        )

    def count(self) -> None:
        """Note that the active tokens ran one more loop."""
        self.loops = self.loops + self.active

    def halt(self, where: Tensor, reasons: Tensor) -> None:
        """Stop the active tokens among ``where`` for ``reasons``, both broadcast to ``[B, T]``."""
        stops = self.active & where
        self.reasons = torch.where(stops, reasons.to(torch.int8), self.reasons)
        self.active = self.active & ~stops


def may_halt(is_settled: Tensor, active: Tensor, dependency: str) -> Tensor:
    """Which of the tokens that a rule would stop may stop.

    Args:
        is_settled: bool ``[B, T]``, the rule's answer.
        active: bool ``[B, T]``; the others have stopped or never took part.
        dependency: "token", "prefix" or "row".
    """
    if dependency == "token":
        return is_settled
    agrees = is_settled | ~active
    if dependency == "row":
        return agrees.all(dim=1, keepdim=True).expand_as(agrees)
    return agrees.long().cumprod(dim=1).bool()
