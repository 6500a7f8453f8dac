"""One transformer block, pre-norm, with scaled residual branches.

    x = x + a * post(attention(norm(x)))
    y = x + a * post(feed_forward(norm(x)))

``a`` is 1 outside the core; ``post`` is a norm after each sub-layer in the sandwich form of the core and the
identity elsewhere. Reference: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture" (pre-norm);
Ding et al. 2021, "CogView" (norms before and after each sub-layer).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cognexis.configuration_cognexis import BlockSpec
from cognexis.decoder.attention import CognexisAttention
from cognexis.decoder.feed_forward import build_feed_forward
from cognexis.decoder.norm import build_norm
from cognexis.errors import ShapeMismatchError


class TransformerBlock(nn.Module):
    """Attention and feed-forward with their norms.

    Args:
        config: the model's configuration, handed to the attention sites.
        spec: sizes of this block.
        slots: key/value slot of each loop (one entry outside the core).
        sliding_window: see :class:`CognexisAttention`.
        memory_slot: see :class:`CognexisAttention`.
        sandwich: add a norm after each sub-layer.
        residual_mode: "fixed" keeps ``residual_scale``; "learned_scalar" and "learned_vector" train it.
        residual_scale: ``a`` of the equations, or its start value.
    """

    def __init__(
        self,
        config: Any,
        spec: BlockSpec,
        slots: Sequence[int],
        *,
        sliding_window: int | None = None,
        memory_slot: int | None = None,
        sandwich: bool = False,
        residual_mode: str = "fixed",
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.attention_norm = build_norm(spec.norm_type, spec.hidden_size, spec.rms_norm_eps)
        self.attention = CognexisAttention(config, spec, slots, sliding_window, memory_slot)
        self.feed_forward_norm = build_norm(spec.norm_type, spec.hidden_size, spec.rms_norm_eps)
        self.feed_forward = build_feed_forward(spec)
        post = spec.norm_type if sandwich else "none"
        self.post_attention_norm = build_norm(post, spec.hidden_size, spec.rms_norm_eps)
        self.post_feed_forward_norm = build_norm(post, spec.hidden_size, spec.rms_norm_eps)
        self.residual_scale_init = residual_scale
        self.attention_residual_scale: float | nn.Parameter = residual_scale
        self.feed_forward_residual_scale: float | nn.Parameter = residual_scale
        if residual_mode in ("learned_scalar", "learned_vector"):
            shape = (1,) if residual_mode == "learned_scalar" else (spec.hidden_size,)
            self.attention_residual_scale = nn.Parameter(torch.full(shape, residual_scale))
            self.feed_forward_residual_scale = nn.Parameter(torch.full(shape, residual_scale))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        active_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map ``[B, T, H]`` to ``[B, T, H]``; tokens where ``active_mask`` ``[B, T]`` is False keep their input.

        Raises:
            ShapeMismatchError: ``active_mask`` is not of shape ``[B, T]``.
        """
        if active_mask is not None and active_mask.shape != hidden_states.shape[:-1]:
            raise ShapeMismatchError(
                f"active_mask must have shape {tuple(hidden_states.shape[:-1])}, got {tuple(active_mask.shape)}",
                expected=tuple(hidden_states.shape[:-1]),
                actual=tuple(active_mask.shape),
            )
        branch = self.attention(
            self.attention_norm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        output = hidden_states + self._scaled(self.post_attention_norm(branch), self.attention_residual_scale)
        branch = self.feed_forward(self.feed_forward_norm(output))
        output = output + self._scaled(self.post_feed_forward_norm(branch), self.feed_forward_residual_scale)
        return output if active_mask is None else torch.where(active_mask[..., None], output, hidden_states)

    @staticmethod
    def _scaled(branch: Tensor, scale: float | nn.Parameter) -> Tensor:
        return branch if isinstance(scale, float) and scale == 1.0 else branch * scale


class CognexisBlock(GradientCheckpointingLayer, TransformerBlock):
    """A block of the prelude or the coda: run once, recomputed in the backward pass when checkpointing is on."""
