"""Cells made of cells, blocks and stacks.

    BlockCell       y = block(x)
    StackCell       y = stack(x), the stack at the cell's width
    SequentialCell  y = cell_n(... cell_0(x))

The state lies below the class name of what is inside: ``{"PreUpBlock": ...}``, ``{"CortexStack": ...}``, and for
several cells ``{"LSTMCell_0": ..., "mLSTMCell_1": ...}``. Blocks and stacks are imported where they are built, since
they in turn need cells.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.registry import build_cell, register_cell
from cognexis.cortex_layers.config import BlockCellConfig, CellConfig, SequentialCellConfig, StackCellConfig
from cognexis.cortex_layers.config_edits import edited
from cognexis.cortex_layers.state import check_input, fresh_state, normalise_resets
from cognexis.cortex_layers.types import MaybeState, ResetMask


def _width(config: CellConfig) -> int:
    if config.hidden_size is None:
        raise ValueError(f"{type(config).__name__}: hidden_size must be set to build a cell")
    return config.hidden_size


class _ComposedCell(MemoryCell):
    """Parts in sequence, each with its state below its own key."""

    def __init__(self, hidden_size: int, parts: list[nn.Module], *, numbered: bool = False) -> None:
        super().__init__(hidden_size)
        self.parts: Any = nn.ModuleList(parts)
        self.part_keys = [type(part).__name__ + f"_{i}" * numbered for i, part in enumerate(parts)]

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        check_input(x, self.hidden_size, type(self).__name__)
        mask = normalise_resets(resets, x, type(self).__name__)
        states: dict[str, MaybeState] = {}
        for key, part in zip(self.part_keys, self.parts, strict=True):
            x, states[key] = part(x, None if state is None else state.get(key, None), resets=mask)
        return x, self._parent(states, x.shape[0])

    def init_state(
        self, batch: int, *, device: torch.device | str, dtype: torch.dtype, traces: bool = True
    ) -> TensorDict:
        pairs = zip(self.part_keys, self.parts, strict=True)
        return self._parent(
            {key: fresh_state(part, batch, device=device, dtype=dtype, traces=traces) for key, part in pairs}, batch
        )

    def reset_state(self, state: MaybeState, mask: Tensor) -> MaybeState:
        if state is None:
            return None
        pairs = zip(self.part_keys, self.parts, strict=True)
        states = {key: part.reset_state(state.get(key, None), mask) for key, part in pairs}
        return self._parent(states, state.batch_size[0])

    @staticmethod
    def _parent(states: dict[str, MaybeState], rows: int) -> TensorDict:
        empty = TensorDict({}, batch_size=[rows])
        return TensorDict({key: empty if state is None else state for key, state in states.items()}, batch_size=[rows])


@register_cell(BlockCellConfig)
class BlockCell(_ComposedCell):
    """A block used as a cell."""

    def __init__(self, config: BlockCellConfig) -> None:
        from cognexis.cortex_layers.blocks.registry import build_block_at_width

        size = _width(config)
        super().__init__(size, [build_block_at_width(config.block, size)])


@register_cell(StackCellConfig)
class StackCell(_ComposedCell):
    """A stack used as a cell."""

    def __init__(self, config: StackCellConfig) -> None:
        from cognexis.cortex_layers.stacks.base import CortexStack

        size = _width(config)
        super().__init__(size, [CortexStack(edited(config.stack, d_hidden=size))])


@register_cell(SequentialCellConfig)
class SequentialCell(_ComposedCell):
    """Several cells one after another."""

    def __init__(self, config: SequentialCellConfig) -> None:
        size = _width(config)
        cells: list[nn.Module] = [build_cell(edited(cell, hidden_size=size)) for cell in config.cells]
        super().__init__(size, cells, numbered=True)
