"""Memory cells and what is built from them.

:data:`CELLS` is the table of what the package brings; ``register_cell`` adds to it.
"""

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.conv import CausalConv1d
from cognexis.cortex_layers.cells.gru import GRUCell
from cognexis.cortex_layers.cells.lstm import LSTMCell
from cognexis.cortex_layers.cells.mlstm import mLSTMCell
from cognexis.cortex_layers.cells.registry import build_cell, get_cell_class, get_cell_config_class, register_cell
from cognexis.cortex_layers.config import CausalConv1dConfig, CellConfig, GRUCellConfig, LSTMCellConfig, mLSTMCellConfig

CELLS: dict[type[CellConfig], type[MemoryCell]] = {
    CausalConv1dConfig: CausalConv1d,
    GRUCellConfig: GRUCell,
    LSTMCellConfig: LSTMCell,
    mLSTMCellConfig: mLSTMCell,
}
for _config, _cell in CELLS.items():
    register_cell(_config)(_cell)

__all__ = [
    "CELLS",
    "CausalConv1d",
    "GRUCell",
    "LSTMCell",
    "MemoryCell",
    "build_cell",
    "get_cell_class",
    "get_cell_config_class",
    "mLSTMCell",
    "register_cell",
]
