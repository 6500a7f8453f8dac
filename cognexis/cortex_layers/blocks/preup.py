"""Pre-up block: project up, run the cell at the inner width, gate, project down.

    [a, z] = in_proj(norm(x))
    h = cell(SiLU(a))
    y = x + out_proj((h + learnable_skip * SiLU(a)) * SiLU(z))

D width of the stack, I = int(proj_factor * D) inner width. An mLSTM gets ``a`` itself, since its own convolution ends
in a SiLU, unless Axon layers make its q, k and v; so does every cell with ``activate_cell_input=False``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cognexis.cortex_layers.blocks.base import BaseBlock, layer_norm
from cognexis.cortex_layers.blocks.registry import register_block
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.mlstm import mLSTMCell
from cognexis.cortex_layers.config import PreUpBlockConfig, inner_size
from cognexis.cortex_layers.state import check_input
from cognexis.cortex_layers.types import MaybeState, ResetMask


@register_block(PreUpBlockConfig)
class PreUpBlock(BaseBlock):
    """The cell between a projection up and a gated projection down."""

    def __init__(self, config: PreUpBlockConfig, d_hidden: int, cell: MemoryCell) -> None:
        super().__init__(d_hidden, cell)
        inner = inner_size(config.proj_factor, d_hidden)
        self.expect_cell_size(inner)
        self.norm = layer_norm(d_hidden)
        self.in_proj = nn.Linear(d_hidden, 2 * inner)
        self.out_proj = nn.Linear(inner, d_hidden)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        plain_mlstm = isinstance(cell, mLSTMCell) and not cell.cfg.use_axon_qkv
        self.activates_input = config.activate_cell_input and not plain_mlstm

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        check_input(x, self.d_hidden, type(self).__name__)
        up, gate = self.in_proj(self.norm(x)).chunk(2, dim=-1)  # both [..., I]
        active = F.silu(up)
        cell_input = (active if self.activates_input else up).to(x.dtype)  # under autocast the state keeps its dtype
        h, next_state = self.run_cell(cell_input, state, resets)
        return x + self.out_proj((h + self.learnable_skip * active) * F.silu(gate)), next_state
