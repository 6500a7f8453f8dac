"""What a generation reports: why each row and each token's loops stopped, and the compute that was spent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from cognexis.looping.options import LoopOptions
from cognexis.looping.schedulers.guard import scheduler_fault
from cognexis.looping.session import LoopSession
from cognexis.looping.trace import LoopRecorder


@dataclass
class CognexisGenerateOutput(GenerateDecoderOnlyOutput):
    """Generated sequences with the compute they took.

    Attributes:
        loop_counts: ``[B, N]`` loops behind each of the N new tokens; 0 after a row has ended.
        effective_depths: ``[B, N]`` blocks behind each new token; 0 after a row has ended.
        halt_reasons: per row, why the loops of each new token stopped.
        stop_reasons: per row, why generation stopped: "eos_token", "max_new_tokens", "stop_string",
            "budget_exhausted" (``max_time`` or a budget) or "cancelled" (a stopping criterion of the caller).
        budget_used: ``[B]`` core applications up to the row's last token, drafts by this model included; of a pass
            whose tokens differ the deepest counts.
        loop_diagnostics: bounds, mode, scheduler and its summary, cache policy, mean loops by phase ("prefill",
            "decode"), cache bytes, and whether the run went beyond the trained depth.
    """

    loop_counts: Tensor | None = None
    effective_depths: Tensor | None = None
    halt_reasons: list[list[str]] | None = None
    stop_reasons: list[str] | None = None
    budget_used: Tensor | None = None
    loop_diagnostics: dict[str, Any] | None = None


@dataclass
class CognexisGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """As :class:`CognexisGenerateOutput`, for beam search."""

    loop_counts: Tensor | None = None
    effective_depths: Tensor | None = None
    halt_reasons: list[list[str]] | None = None
    stop_reasons: list[str] | None = None
    budget_used: Tensor | None = None
    loop_diagnostics: dict[str, Any] | None = None


@dataclass(frozen=True)
class StopSettings:
    """What may end a row before its length limit: end tokens, stop strings, time, a caller's criteria, a budget."""

    eos_ids: list[int]
    has_stop_strings: bool
    max_time: float | None
    has_criteria: bool
    pad_token_id: int | None
    is_spent: Callable[[int], bool]


def stop_reason(tokens: list[int], stops: StopSettings, is_full: bool, is_spent: bool) -> str:
    """Why a row ended after ``tokens``: end token, length, budget, stop string, time, or a caller's criterion."""
    if tokens and tokens[-1] in stops.eos_ids:
        return "eos_token"
    if is_full:
        return "max_new_tokens"
    if is_spent:
        return "budget_exhausted"
    if stops.has_stop_strings:
        return "stop_string"
    return "cancelled" if stops.max_time is None else "budget_exhausted"


def _row_length(tokens: list[int], stops: StopSettings) -> int:
    """New tokens of a row without the padding that follows its end."""
    for index, token in enumerate(tokens):
        if token in stops.eos_ids:
            return index + 1
    end = len(tokens)
    if stops.has_stop_strings or stops.has_criteria:  # only these end a row without an end token of its own
        while end > 1 and tokens[end - 1] == stops.pad_token_id:
            end -= 1
    return end


def with_loop_stats(
    result: Any,
    recorder: LoopRecorder,
    config: Any,
    stops: StopSettings,
    options: LoopOptions,
    prompt_length: int,
    session: LoopSession | None,
) -> Any:
    """Wrap transformers' output with the statistics that ``recorder`` collected."""
    total = result.sequences.shape[1]
    new = result.sequences[:, prompt_length:].tolist()
    is_full = recorder.max_length is not None and total >= recorder.max_length
    is_beam = isinstance(result, GenerateBeamDecoderOnlyOutput)
    origins = _origins(result, session, len(new), len(new[0]))
    counts = recorder.token_loops(origins)
    if recorder.mixes_depths and not is_beam:  # ended rows run nothing
        lengths = (counts > 0).sum(dim=1).tolist()
    else:
        lengths = [_row_length(row, stops) for row in new]
    counts = counts * torch.tensor([[i < n for i in range(len(new[0]))] for n in lengths])
    depths = config.effective_depth(0) + counts * config.num_recurrent_blocks
    return (CognexisGenerateBeamOutput if is_beam else CognexisGenerateOutput)(
        **result,
        loop_counts=counts,
        effective_depths=torch.where(counts > 0, depths, 0),
        halt_reasons=recorder.halt_reasons(origins, lengths),
        stop_reasons=[
            stop_reason(row[:n], stops, is_full and n == len(row), stops.is_spent(index))
            for index, (row, n) in enumerate(zip(new, lengths, strict=True))
        ],
        budget_used=recorder.total_loops(origins, lengths),
        loop_diagnostics={
            "loop_mode": options.loop_mode,
            "requested_loops": options.requested_loops,
            "min_loops": options.min_loops,
            "max_loops": options.max_loops,
            "extrapolated": max(int(p.max()) for p in recorder.passes) > options.trained_max_loops,
            "cache_policy": options.cache_policy,
            "phases": recorder.by_phase(),
            **(_scheduler_facts(options) if options.scheduler is not None else {}),
            **({} if session is None else {"cache_bytes": session.cache_bytes}),
        },
    )


def _origins(result: Any, session: LoopSession | None, rows: int, num_tokens: int) -> Tensor:
    """Row ``[R, N]`` of the batch that computed each new token of the returned rows."""
    beams = getattr(result, "beam_indices", None)
    if beams is not None:
        return beams[:, :num_tokens].clamp(min=0).cpu()
    kept = None if session is None or session.beams == (1, 1) else session.kept_rows
    return (torch.arange(rows) if kept is None else kept)[:, None].expand(rows, num_tokens)


def _scheduler_facts(options: LoopOptions) -> dict[str, Any]:
    assert options.scheduler is not None
    with scheduler_fault(options.scheduler, "finish"):
        summary = options.scheduler.finish()
    return {
        "scheduler": options.scheduler.to_dict(),
        "halt_dependency": options.halt_dependency or "prefix",
        "quality_tier": options.quality_tier,
        "scheduler_summary": summary,
    }
