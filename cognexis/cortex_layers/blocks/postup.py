"""Post-up block: the cell at the stack's width, then a feed-forward layer, each with a residual.

    y1 = x + cell(norm(x))
    n = ffn_norm(y1)
    y = y1 + out2(SiLU(gate(n)) * up(n))        gated=False: y1 + out2(SiLU(up(n)))

D width of the stack, I = int(proj_factor * D) width of the feed-forward layer.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from cognexis.cortex_layers.blocks.base import BaseBlock, layer_norm
from cognexis.cortex_layers.blocks.registry import register_block
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import PostUpBlockConfig, inner_size
from cognexis.cortex_layers.state import check_input
from cognexis.cortex_layers.types import MaybeState, ResetMask


@register_block(PostUpBlockConfig)
class PostUpBlock(BaseBlock):
    """The cell, then a feed-forward layer."""

    def __init__(self, config: PostUpBlockConfig, d_hidden: int, cell: MemoryCell) -> None:
        super().__init__(d_hidden, cell)
        self.expect_cell_size(d_hidden)
        inner = inner_size(config.proj_factor, d_hidden)
        self.norm = layer_norm(d_hidden)
        self.ffn_norm = layer_norm(d_hidden)
        self.gate = nn.Linear(d_hidden, inner) if config.gated else None
        self.up = nn.Linear(d_hidden, inner)
        self.out2 = nn.Linear(inner, d_hidden)

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        check_input(x, self.d_hidden, type(self).__name__)
        h, next_state = self.run_cell(self.norm(x), state, resets)
        y = x + h
        n = self.ffn_norm(y)
        inner = F.silu(self.up(n)) if self.gate is None else F.silu(self.gate(n)) * self.up(n)
        return y + self.out2(inner), next_state
