"""The record of the loops that a call or a generation really ran."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cognexis.looping.options import LoopOptions


@dataclass
class LoopDiagnostics:
    """What one forward did in the core.

    Attributes:
        loop_mode: mode of the call.
        requested_loops: loops asked for.
        executed_loops: loops run.
        extrapolated: more loops than the weights were trained with.
        input_injection: how h_0 entered the loops.
        norms: ``[L + 1]`` mean norm of the state, entry 0 before the first loop; None when not recorded.
        gate_mean: ``[L]`` mean gate by loop; None without a gate or when not recorded.
        is_finite: ``[L + 1]`` flags, entry 0 before the first loop; None when not recorded.
        residual_scales: smallest and largest residual scale of each core block.
    """

    loop_mode: str
    requested_loops: int
    executed_loops: int
    extrapolated: bool
    input_injection: str
    norms: Tensor | None = None
    gate_mean: Tensor | None = None
    is_finite: Tensor | None = None
    residual_scales: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_run(cls, options: LoopOptions, core: Any, input_injection: str) -> "LoopDiagnostics":
        """Summarise a run of the core; ``core`` is its output."""
        return cls(
            loop_mode=options.loop_mode,
            requested_loops=options.requested_loops,
            executed_loops=options.num_loops,
            extrapolated=options.extrapolated,
            input_injection=input_injection,
            norms=core.norms,
            gate_mean=core.gate_mean,
            is_finite=core.is_finite,
        )


class LoopRecorder:
    """Collects, step by step, the loops that each row of a generation ran.

    Attributes:
        steps: one ``[B]`` tensor of loop counts per emitted token.
        passes: one ``[B]`` tensor per forward pass; assisted decoding verifies several tokens in one.
        max_length: longest sequence that the request allows, prompt included; None before generation starts.
        pad_token_id: fills rows that have ended, or None.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.passes: list[Tensor] = []
        self.max_length: int | None = None
        self.pad_token_id: int | None = None

    def append(self, loop_counts: Tensor, num_new_tokens: int = 1) -> None:
        """Note that the pass just run, with ``loop_counts`` ``[B]``, yields ``num_new_tokens`` tokens per row."""
        self.passes.append(loop_counts)
        self.steps += [loop_counts] * int(num_new_tokens)

    def token_loops(self, num_tokens: int) -> Tensor:
        """Loops ``[B, num_tokens]`` behind each emitted token."""
        return torch.stack(self.steps[:num_tokens], dim=1)

    def total_loops(self) -> Tensor:
        """Core applications ``[B]`` of each row over all passes."""
        return torch.stack(self.passes).sum(dim=0)
