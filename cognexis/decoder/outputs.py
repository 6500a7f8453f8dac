"""What a forward returns: transformers' own fields, then the loops that were run."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

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
