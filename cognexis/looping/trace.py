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
        passes: one ``[B]`` tensor per forward pass, chunks of a prompt and drafts by the model itself included.
        max_length: longest sequence that the request allows, prompt included; None before generation starts.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.passes: list[Tensor] = []
        self.max_length: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoopRecorder":
        """A draft by the same model has steps of its own and counts its passes here."""
        draft = LoopRecorder()
        draft.passes = self.passes
        return draft

    def begin_pass(self, rows: int, num_loops: int) -> None:
        """Note that a forward pass of ``num_loops`` loops over ``rows`` rows starts."""
        self.passes.append(torch.full((rows,), num_loops))

    def append(self, loop_counts: Tensor, num_new_tokens: int = 1) -> None:
        """Note that the pass just run, with ``loop_counts`` ``[B]``, yields ``num_new_tokens`` tokens per row."""
        self.steps += [loop_counts] * int(num_new_tokens)

    def token_loops(self, num_tokens: int) -> Tensor:
        """Loops ``[B, num_tokens]`` behind each emitted token."""
        return torch.stack(self.steps[:num_tokens], dim=1)

    def total_loops(self, lengths: list[int]) -> Tensor:
        """Core applications of each row, up to the pass that gave its last token; ``lengths`` counts new tokens."""
        unused = [len(self.steps) - n for n in lengths]
        return torch.stack([torch.stack(self.passes)[: len(self.passes) - u, 0].sum() for u in unused])
