"""Pass-through block: the cell at the stack's width.

y = x + cell(x), or y = cell(x) with ``residual=False``. No norm. D width of the stack.
"""

from torch import Tensor

from cognexis.cortex_layers.blocks.base import BaseBlock
from cognexis.cortex_layers.blocks.registry import register_block
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import PassThroughBlockConfig
from cognexis.cortex_layers.state import check_input
from cognexis.cortex_layers.types import MaybeState, ResetMask


@register_block(PassThroughBlockConfig)
class PassThroughBlock(BaseBlock):
    """The cell, with a residual around it."""

    def __init__(self, config: PassThroughBlockConfig, d_hidden: int, cell: MemoryCell) -> None:
        super().__init__(d_hidden, cell)
        self.expect_cell_size(d_hidden)
        self.residual = config.residual

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        check_input(x, self.d_hidden, type(self).__name__)
        y, next_state = self.run_cell(x, state, resets)
        return (x + y if self.residual else y), next_state
