"""Memory cells and what is built from them.

:data:`CELLS` is the table of what the package brings; ``register_cell`` adds to it.
"""

from cognexis.cortex_layers.cells.agalite import AGaLiTeCell
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.composed import BlockCell, SequentialCell, StackCell
from cognexis.cortex_layers.cells.conv import CausalConv1d
from cognexis.cortex_layers.cells.core import AxonCell, AxonLayer
from cognexis.cortex_layers.cells.gru import GRUCell
from cognexis.cortex_layers.cells.hf_llama import HFLlamaLayerCell
from cognexis.cortex_layers.cells.lstm import LSTMCell
from cognexis.cortex_layers.cells.mlstm import mLSTMCell
from cognexis.cortex_layers.cells.registry import build_cell, get_cell_class, get_cell_config_class, register_cell
from cognexis.cortex_layers.cells.slstm import sLSTMCell
from cognexis.cortex_layers.cells.xl import XLCell
from cognexis.cortex_layers.config import (
    AGaLiTeCellConfig,
    AxonConfig,
    BlockCellConfig,
    CausalConv1dConfig,
    CellConfig,
    GRUCellConfig,
    HFLlamaLayerConfig,
    LSTMCellConfig,
    SequentialCellConfig,
    StackCellConfig,
    XLCellConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)

CELLS: dict[type[CellConfig], type[MemoryCell]] = {
    AGaLiTeCellConfig: AGaLiTeCell,
    AxonConfig: AxonCell,
    BlockCellConfig: BlockCell,
    CausalConv1dConfig: CausalConv1d,
    GRUCellConfig: GRUCell,
    HFLlamaLayerConfig: HFLlamaLayerCell,
    LSTMCellConfig: LSTMCell,
    SequentialCellConfig: SequentialCell,
    StackCellConfig: StackCell,
    XLCellConfig: XLCell,
    mLSTMCellConfig: mLSTMCell,
    sLSTMCellConfig: sLSTMCell,
}
for _config, _built_in in CELLS.items():
    register_cell(_config)(_built_in)

__all__ = [
    "CELLS",
    "AGaLiTeCell",
    "AxonCell",
    "AxonLayer",
    "BlockCell",
    "CausalConv1d",
    "GRUCell",
    "HFLlamaLayerCell",
    "LSTMCell",
    "MemoryCell",
    "SequentialCell",
    "StackCell",
    "XLCell",
    "build_cell",
    "get_cell_class",
    "get_cell_config_class",
    "mLSTMCell",
    "register_cell",
    "sLSTMCell",
]
