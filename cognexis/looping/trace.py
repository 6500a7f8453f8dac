"""The record of the loops that a call or a generation really ran."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cognexis.looping.options import LoopOptions
from cognexis.looping.schedulers.base import reason_code, reason_name


@dataclass
class LoopDiagnostics:
    """What one forward did in the core.

    Attributes:
        loop_mode: mode of the call.
        requested_loops: loops asked for; in the adaptive modes the bound.
        executed_loops: loops run, by the deepest token.
        extrapolated: more loops than the weights were trained with.
        input_injection: how h_0 entered the loops.
        norms: ``[L + 1]`` mean norm of the state, entry 0 before the first loop; None when not recorded.
        gate_mean: ``[L]`` mean gate by loop; None without a gate or when not recorded.
        is_finite: ``[L + 1]`` flags, entry 0 before the first loop; None when not recorded.
        residual_scales: smallest and largest residual scale of each core block.
        scheduler: what decided, as in ``scheduler.json``; None in fixed mode.
        halt_dependency: whose agreement a token needed; None in fixed mode.
        cache_policy: how keys of earlier tokens were kept.
        active: ``[L]`` tokens that ran each loop; None unless depths may differ.
        signals: by name ``[L]``, mean of the signal over the tokens that ran the loop.
        histogram: ``[L + 1]`` real tokens by loops run.
        halt_counts: tokens by halt reason.
        computed_tokens: token positions that the core computed, all loops together; None unless depths may differ.
        num_probes: times that coda and head were run to measure.
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
    scheduler: dict[str, Any] | None = None
    halt_dependency: str | None = None
    cache_policy: str = "depth_indexed"
    active: Tensor | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)
    histogram: Tensor | None = None
    halt_counts: dict[str, int] = field(default_factory=dict)
    computed_tokens: int | None = None
    num_probes: int = 0

    @classmethod
    def from_run(cls, options: LoopOptions, core: Any, input_injection: str) -> "LoopDiagnostics":
        """Summarise a run of the core; ``core`` is its output. Waits for the device where depths may differ."""
        diagnostics = cls(
            loop_mode=options.loop_mode,
            requested_loops=options.requested_loops,
            executed_loops=options.num_loops,
            extrapolated=options.extrapolated,
            input_injection=input_injection,
            norms=core.norms,
            gate_mean=core.gate_mean,
            is_finite=core.is_finite,
            cache_policy=options.cache_policy,
        )
        if core.halt is not None:
            loops, codes = core.halt.loops, core.halt.reasons
            is_real = codes != reason_code("forced")
            diagnostics.executed_loops = int(loops.max())
            diagnostics.extrapolated = diagnostics.executed_loops > options.trained_max_loops
            diagnostics.histogram = torch.bincount(loops[is_real], minlength=diagnostics.executed_loops + 1)
            counts = torch.bincount(codes.flatten().long()).tolist()
            diagnostics.halt_counts = {str(reason_name(code)): n for code, n in enumerate(counts) if n and code}
            diagnostics.computed_tokens, diagnostics.num_probes = core.computed_tokens, core.num_probes
            diagnostics.active = torch.stack(core.trace.active)
            diagnostics.signals = {name: torch.stack(means) for name, means in core.trace.signals.items()}
        if options.scheduler is not None:
            diagnostics.scheduler = options.scheduler.to_dict()
            diagnostics.halt_dependency = options.dependency(core.hidden_states.shape[1])
        return diagnostics


class LoopRecorder:
    """Collects, step by step, the loops that each row of a generation ran.

    Attributes:
        steps: one ``[B]`` tensor of loop counts per emitted token; 0 for a row that has ended, where rows may differ.
        reasons: beside each of them the halt reasons as codes ``[B]``; None where all ran a fixed number.
        passes: one ``[B]`` tensor per forward pass, chunks of a prompt and drafts by the model itself included.
        ends: beside each step the number of passes up to it.
        num_prefill: how many of the passes read the prompt.
        max_length: longest sequence that the request allows, prompt included; None before generation starts.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.reasons: list[Tensor | None] = []
        self.passes: list[Tensor] = []
        self.ends: list[int] = []
        self.num_prefill = 0
        self.max_length: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoopRecorder":
        """A draft by the same model has steps of its own and counts its passes here."""
        draft = LoopRecorder()
        draft.passes = self.passes
        return draft

    def begin_pass(self, rows: int, num_loops: int) -> None:
        """Note that a forward pass of ``num_loops`` loops over ``rows`` rows starts."""
        self.passes.append(torch.full((rows,), num_loops))

    def append(self, loop_counts: Tensor, halt_codes: Tensor | None = None, num_new_tokens: int = 1) -> None:
        """Note that the pass just run yields ``num_new_tokens`` tokens per row.

        Args:
            loop_counts: ``[B]``, or ``[B, T]`` by token.
            halt_codes: of the same shape; given where rows may differ, and then the pass is counted by them.
            num_new_tokens: tokens per row.
        """
        if not self.steps:
            self.num_prefill = len(self.passes)
        if halt_codes is not None:
            self.passes[-1] = loop_counts.amax(dim=1) if loop_counts.ndim == 2 else loop_counts
        last = loop_counts[:, -1] if loop_counts.ndim == 2 else loop_counts
        codes = halt_codes if halt_codes is None or halt_codes.ndim == 1 else halt_codes[:, -1]
        self.steps += [last] * int(num_new_tokens)
        self.reasons += [codes] * int(num_new_tokens)
        self.ends += [len(self.passes)] * int(num_new_tokens)

    @property
    def mixes_depths(self) -> bool:
        """Whether rows may differ."""
        return bool(self.reasons) and self.reasons[0] is not None

    def abandon_pass(self) -> None:
        """Forget a pass that was begun and yields no token."""
        del self.passes[self.ends[-1] if self.ends else 0 :]

    def token_loops(self, origins: Tensor) -> Tensor:
        """Loops ``[R, N]`` behind each emitted token.

        Args:
            origins: ``[R, N]`` rows that computed the tokens: a beam continues now this row, now that.
        """
        return torch.stack(self.steps[: origins.shape[1]], dim=1).cpu().gather(0, origins)

    def halt_reasons(self, origins: Tensor, lengths: list[int]) -> list[list[str]]:
        """Why the loops of each new token stopped, by row; ``lengths`` counts new tokens."""
        if not self.mixes_depths:
            return [["max_loops"] * n for n in lengths]
        codes = torch.stack([codes for codes in self.reasons if codes is not None][: origins.shape[1]], dim=1)
        rows = codes.cpu().gather(0, origins).tolist()
        return [[str(reason_name(code)) for code in row[:n]] for row, n in zip(rows, lengths, strict=True)]

    def total_loops(self, origins: Tensor, lengths: list[int]) -> Tensor:
        """Core applications ``[R]`` of each row, up to the pass that gave its last token."""
        num_passes = torch.tensor(self.ends[: origins.shape[1]]).diff(prepend=torch.tensor([0]))  # behind each token
        is_used = torch.arange(origins.shape[1]) < torch.tensor(lengths)[:, None]
        origins, is_used = (x.repeat_interleave(num_passes, dim=1) for x in (origins, is_used))
        passes = torch.stack([p.cpu() for p in self.passes[: origins.shape[1]]], dim=1)
        return (passes.gather(0, origins) * is_used).sum(dim=1)

    def by_phase(self) -> dict[str, dict[str, Any]]:
        """Mean and largest number of loops of a row's pass over the prompt, and of its later passes."""
        phases = {}
        for name, some in (("prefill", self.passes[: self.num_prefill]), ("decode", self.passes[self.num_prefill :])):
            if counts := [p.cpu() for p in some]:
                loops = torch.cat(counts).double()
                ran = loops[loops > 0] if bool((loops > 0).any()) else loops
                phases[name] = {"passes": len(counts), "mean_loops": ran.mean().item(), "max_loops": int(ran.max())}
        return phases
