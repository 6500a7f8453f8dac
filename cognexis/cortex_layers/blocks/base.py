"""The interface of every block: a cell, and what stands around it at the stack's width D.

The state is ``{<class name of the cell>: state of the cell}``. Blocks make new states and never change the one given.
"""

from abc import ABC, abstractmethod

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.state import fresh_state
from cognexis.cortex_layers.types import MaybeState, ResetMask


def child_state(state: MaybeState, key: str) -> TensorDict | None:
    """The state below ``key``; None, which means fresh, where there is none."""
    return None if state is None else state.get(key, None)


def parent_state(children: dict[str, MaybeState], rows: int) -> TensorDict:
    """A new state with ``children``; one that has no state becomes empty."""
    empty = [key for key, child in children.items() if child is None]
    return TensorDict({**children, **{key: TensorDict({}, batch_size=[rows]) for key in empty}}, batch_size=[rows])


class BaseBlock(nn.Module, ABC):
    """A block at width D.

    Args:
        d_hidden: width D of input and output.
        cell: the cell inside; None for a block that has none of its own.
    """

    def __init__(self, d_hidden: int, cell: MemoryCell | None = None) -> None:
        super().__init__()
        if d_hidden is None or d_hidden < 1:
            raise ValueError(f"{type(self).__name__}: d_hidden={d_hidden!r}: must be a positive integer")
        self.d_hidden = d_hidden
        if cell is not None or not isinstance(getattr(type(self), "cell", None), property):
            self.cell = cell

    @abstractmethod
    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        """Consume ``[B, D]`` or ``[B, T, D]``; return output of the same form and the new state."""

    def run_cell(self, x: Tensor, state: MaybeState, resets: ResetMask | None = None) -> tuple[Tensor, TensorDict]:
        """Run the cell on its part of the block's state; return its output and the block's new state."""
        cell, name = self.the_cell(), self.state_key
        y, cell_state = cell(x, child_state(state, name), resets=resets)
        return y, parent_state({name: cell_state}, x.shape[0])

    @property
    def state_key(self) -> str:
        """Where the cell's state lies in the block's."""
        return type(self.the_cell()).__name__

    def the_cell(self) -> MemoryCell:
        """The cell, which must be there.

        Raises:
            ValueError: the block was built without one.
        """
        if self.cell is None:
            raise ValueError(f"{type(self).__name__}: needs a cell, and got none")
        return self.cell

    def expect_cell_size(self, size: int) -> None:
        """Check the width of the cell.

        Raises:
            ValueError: it is another than ``size``.
        """
        if self.the_cell().hidden_size != size:
            raise ValueError(
                f"{type(self).__name__}: the cell has hidden_size={self.the_cell().hidden_size}, expected {size}"
            )

    def init_state(
        self, batch: int, *, device: torch.device | str, dtype: torch.dtype, traces: bool = True
    ) -> TensorDict:
        """A fresh state for ``batch`` rows; without ``traces`` Axon parts keep none."""
        if self.cell is None:
            return TensorDict({}, batch_size=[batch])
        inner = fresh_state(self.cell, batch, device=device, dtype=dtype, traces=traces)
        return parent_state({self.state_key: inner}, batch)

    def reset_state(self, state: MaybeState, mask: Tensor) -> MaybeState:
        """A state whose rows of ``mask`` are fresh."""
        inner = child_state(state, self.state_key) if self.cell is not None else None
        if state is None or inner is None:
            return state
        return parent_state({self.state_key: self.the_cell().reset_state(inner, mask)}, state.batch_size[0])


def layer_norm(width: int) -> nn.LayerNorm:
    """A layer norm with a weight and no bias."""
    return nn.LayerNorm(width, bias=False)
