"""Gated post-up block: post-up with the gates of a GRU in place of the residuals.

    y1 = G1(x, cell(norm1(x)))
    y  = G2(y1, ffn_out(SiLU(ffn_in(norm2(y1)))))

    G(x, y):  r = sigmoid(Wr y + Ur x);  z = sigmoid(Wz y + Uz x - bias)
              h = tanh(Wg y + Ug (r * x));  G = (1 - z) * x + z * h

The bias starts at ``gru_bias``: 2 gives z of about 0.12, near the identity. D width of the stack.
Source: Parisotto et al. 2019, "Stabilizing Transformers for Reinforcement Learning", section 3.2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cognexis.cortex_layers.blocks.base import BaseBlock, layer_norm
from cognexis.cortex_layers.blocks.registry import register_block
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import PostUpGatedBlockConfig, inner_size
from cognexis.cortex_layers.state import check_input
from cognexis.cortex_layers.types import MaybeState, ResetMask


class GRUGate(nn.Module):
    """Mix the stream x ``[..., D]`` and an update y of the same shape."""

    def __init__(self, d_hidden: int, bias: float) -> None:
        super().__init__()
        self.w_r, self.u_r, self.w_z, self.u_z, self.w_g, self.u_g = (
            nn.Linear(d_hidden, d_hidden, bias=False) for _ in range(6)
        )
        self.bias = nn.Parameter(torch.full((d_hidden,), float(bias)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        r = torch.sigmoid(self.w_r(y) + self.u_r(x))
        z = torch.sigmoid(self.w_z(y) + self.u_z(x) - self.bias)
        h = torch.tanh(self.w_g(y) + self.u_g(r * x))
        return (1 - z) * x + z * h


@register_block(PostUpGatedBlockConfig)
class PostUpGatedBlock(BaseBlock):
    """The cell, then a feed-forward layer, each behind a GRU gate."""

    def __init__(self, config: PostUpGatedBlockConfig, d_hidden: int, cell: MemoryCell) -> None:
        super().__init__(d_hidden, cell)
        self.expect_cell_size(d_hidden)
        inner = inner_size(config.proj_factor, d_hidden)
        self.norm1 = layer_norm(d_hidden)
        self.norm2 = layer_norm(d_hidden)
        self.gate1 = GRUGate(d_hidden, config.gru_bias)
        self.gate2 = GRUGate(d_hidden, config.gru_bias)
        self.ffn_in = nn.Linear(d_hidden, inner)
        self.ffn_out = nn.Linear(inner, d_hidden)

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        check_input(x, self.d_hidden, type(self).__name__)
        h, next_state = self.run_cell(self.norm1(x), state, resets)
        y = self.gate1(x, h)
        return self.gate2(y, self.ffn_out(F.silu(self.ffn_in(self.norm2(y))))), next_state
