"""A fixed depth: halt when ``num_loops`` loops have run, moved into the bounds and the budget of the request."""

from dataclasses import dataclass

import torch

from cognexis.looping.schedulers.base import LoopDecision, LoopObservation, LoopScheduler, reason_code
from cognexis.looping.schedulers.fields import whole_number
from cognexis.looping.schedulers.guard import apply_bounds

_DEPTH_REACHED = reason_code("max_loops")


@dataclass(eq=False)
class FixedScheduler(LoopScheduler):
    """Runs ``num_loops`` loops; a depth that is reached halts with the reason max_loops.

    Attributes:
        num_loops: depth, at least 1; None: as deep as the request permits.

    Raises:
        InvalidConfigError: ``num_loops`` is no such number.
    """

    name = "fixed"
    num_loops: int | None = None

    def __post_init__(self) -> None:
        if self.num_loops is not None:
            self.num_loops = whole_number("num_loops", self.num_loops, at_least=1)

    def observe(self, observation: LoopObservation) -> LoopDecision:
        is_reached = self.num_loops is not None and observation.loops >= self.num_loops
        halt = torch.full(observation.shape, is_reached, device=observation.device)
        reasons = torch.full(observation.shape, _DEPTH_REACHED, dtype=torch.int8, device=observation.device)
        return self.record(observation, apply_bounds(observation, LoopDecision(halt, reasons)))
