"""Attention over the experts of a column, per token.

    q_i = w_q u + q_bias_i,  k_i = w_k delta_i,  v_i = w_v delta_i
    delta_i + w_o sum_j softmax_j(q_i . k_j / sqrt(d_key)) v_j

w_o starts at zero, so the mixer starts as the identity. Experts that do not take part in a token are neither asked nor
changed. Letters: B batch, T time, D width, E experts.
"""

import math

import torch
from torch import Tensor, nn

from cognexis.cortex_layers.state import accumulator_dtype


class ExpertMixer(nn.Module):
    """Let the experts' updates see each other.

    Args:
        d_hidden: width D.
        num_experts: E.
        d_key: width of queries, keys and values.
    """

    def __init__(self, d_hidden: int, num_experts: int, d_key: int) -> None:
        super().__init__()
        self.d_key = d_key
        self.w_q = nn.Linear(d_hidden, d_key, bias=False)
        self.w_k = nn.Linear(d_hidden, d_key, bias=False)
        self.w_v = nn.Linear(d_hidden, d_key, bias=False)
        self.w_o = nn.Linear(d_key, d_hidden, bias=False)
        self.q_bias = nn.Parameter(torch.empty(num_experts, d_key))
        for weight in (self.w_q.weight, self.w_k.weight, self.w_v.weight, self.q_bias):
            nn.init.uniform_(weight, -1e-3, 1e-3)
        nn.init.zeros_(self.w_o.weight)

    def forward(self, u: Tensor, deltas: Tensor, active: Tensor | None = None) -> Tensor:
        """Mix.

        Args:
            u: tokens ``[B, T, D]``.
            deltas: ``[B, T, E, D]``.
            active: bool ``[E]`` or ``[B, T, E]``, at least one per token; None means all.

        Returns:
            ``[B, T, E, D]``; what stands at inactive experts has no meaning.
        """
        q = self.w_q(u).unsqueeze(-2) + self.q_bias  # [B, T, E, d_key]
        scores = (q @ self.w_k(deltas).transpose(-1, -2)) / math.sqrt(self.d_key)  # [B, T, E, E]
        scores = scores.to(accumulator_dtype(scores.dtype))
        if active is not None:
            scores = scores.masked_fill(~active.unsqueeze(-2), -math.inf)
        return deltas + self.w_o(scores.softmax(dim=-1).to(deltas.dtype) @ self.w_v(deltas))
