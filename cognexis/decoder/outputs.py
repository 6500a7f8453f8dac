"""What a forward returns: transformers' own fields, then the loops that were run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from cognexis.decoder.mixed_loops import named_reasons
from cognexis.decoder.recurrent_core import CoreOutput
from cognexis.decoder.stability import residual_scale_report
from cognexis.looping.options import LoopOptions
from cognexis.looping.trace import LoopDiagnostics


@dataclass
class CognexisModelOutput(BaseModelOutputWithPast):
    """Output of the body.

    Attributes:
        last_hidden_state: ``[B, T, H]``, after the final norm: what the head consumes.
        loop_counts: loops run, ``[B]``; with ``loop_mode="adaptive_token"`` ``[B, T]``, 0 at padding.
        effective_depth: blocks passed, of the same shape.
        loop_states: states kept by ``config.state_retention``, each ``[B, T, H]``.
        halt_codes: why the loops stopped, as codes of ``looping.schedulers.base``, of the same shape; None where all
            ran a fixed number.
        halt_reasons: the same in words, by row and, for tokens, by token; with ``return_loop_stats`` only.
        loop_diagnostics: measurements by loop; with ``return_loop_stats`` only.
    """

    loop_counts: Tensor | None = None
    effective_depth: Tensor | None = None
    loop_states: tuple[Tensor, ...] | None = None
    halt_codes: Tensor | None = None
    halt_reasons: list[Any] | None = None
    loop_diagnostics: LoopDiagnostics | None = None


@dataclass
class CognexisCausalLMOutput(CausalLMOutputWithPast):
    """Output of the language model: ``loss``, ``logits`` ``[B, T, V]`` and the loop fields of the body."""

    loop_counts: Tensor | None = None
    effective_depth: Tensor | None = None
    loop_states: tuple[Tensor, ...] | None = None
    halt_codes: Tensor | None = None
    halt_reasons: list[Any] | None = None
    loop_diagnostics: LoopDiagnostics | None = None


def body_output(
    body: Any, hidden_states: Tensor, past_key_values: Any, options: LoopOptions, core: CoreOutput, stats: bool
) -> CognexisModelOutput:
    """The output of a body whose normed states are ``hidden_states`` ``[B, T, H]`` and whose core left ``core``."""
    rows = hidden_states.shape[0]
    if core.halt is None:
        loops = torch.full((rows,), options.num_loops, dtype=torch.long, device=hidden_states.device)
        codes = None
    else:
        loops, codes = core.halt.loops, core.halt.reasons
        if options.loop_mode != "adaptive_token":  # a row's tokens stop together
            deepest = loops.argmax(dim=1, keepdim=True)
            loops, codes = loops.gather(1, deepest)[:, 0], codes.gather(1, deepest)[:, 0]
    diagnostics, reasons = None, None
    if stats:
        diagnostics = LoopDiagnostics.from_run(options, core, body.config.input_injection)
        if body.config.recurrent_residual_mode.startswith("learned"):
            diagnostics.residual_scales = residual_scale_report(body.recurrent)
        reasons = ["max_loops"] * rows if codes is None else named_reasons(codes.tolist())
    depth = body.config.effective_depth(0) + loops * body.config.num_recurrent_blocks
    return CognexisModelOutput(
        last_hidden_state=hidden_states,
        past_key_values=past_key_values,
        loop_counts=loops,
        effective_depth=depth,
        loop_states=core.states or None,
        halt_codes=codes,
        halt_reasons=reasons,
        loop_diagnostics=diagnostics,
    )


def kept_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The states ``[B, P, H]`` of ``[B, T, H]`` that get logits; see ``CognexisForCausalLM.forward``."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep]
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]
