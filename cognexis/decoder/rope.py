"""Rotary position embedding: queries and keys are rotated by an angle proportional to their position.

Pair i of a head, features (i, i + D/2), is turned by ``position * theta^(-2i / D)`` (the rotate-half layout):

    rotate(x) = x * cos + [-x_second, x_first] * sin

so the score of a query and a key depends on the difference of their positions only. The angles are computed once per
forward and shared by all blocks and loops: the loop index never shifts a position. With
``partial_rotary_factor`` only the first ``D * factor`` features turn. Scaled variants (linear, dynamic, yarn,
longrope, llama3) come from transformers' table.
Letters: B batch, T tokens, N heads, D head width. Reference: Su et al. 2021, "RoFormer", equation 34.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from cognexis.decoder.norm import compute_dtype


class CognexisRotaryEmbedding(nn.Module):
    """Cosines and sines ``[B, T, R]`` (R rotated features) for the positions of a batch."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self._frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """Inverse frequencies ``[R / 2]`` of the unscaled form, and the factor 1 for cosines and sines."""
        width = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _frequencies(self) -> tuple[Tensor, float]:
        default = self.rope_type == "default"
        return (self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type])(self.config)

    def _apply(self, fn: Any, recurse: bool = True) -> "CognexisRotaryEmbedding":
        """Follow device moves but keep the frequencies in float32: rounding them would move every position."""
        super()._apply(fn, recurse)
        for name in ("inv_freq", "original_inv_freq"):
            if (buffer := getattr(self, name)).dtype != torch.float32:
                exact = self._frequencies()[0] if buffer.device.type != "meta" else torch.empty_like(buffer)
                setattr(self, name, exact.to(device=buffer.device, dtype=torch.float32))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Angles for ``position_ids`` ``[B or 1, T]``, in the dtype of ``hidden_states``."""
        dtype = compute_dtype(hidden_states.dtype)
        angles = position_ids[..., None].to(dtype) * self.inv_freq.to(device=hidden_states.device, dtype=dtype)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R features of ``x`` ``[B, N, T, D]`` by the angles ``cos``, ``sin`` ``[B, T, R]``."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
