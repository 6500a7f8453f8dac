"""The public names of the package; ``__init__`` takes them from here when one is first asked for."""

from typing import Any

from cognexis.cortex_layers.blocks.adapter import AdapterBlock
from cognexis.cortex_layers.blocks.base import BaseBlock
from cognexis.cortex_layers.blocks.column.auto import build_column_auto_block, build_column_auto_config
from cognexis.cortex_layers.blocks.column.column import ColumnBlock
from cognexis.cortex_layers.blocks.passthrough import PassThroughBlock
from cognexis.cortex_layers.blocks.postup import PostUpBlock
from cognexis.cortex_layers.blocks.postup_gated import PostUpGatedBlock
from cognexis.cortex_layers.blocks.preup import PreUpBlock
from cognexis.cortex_layers.blocks.registry import build_block, get_block_class, register_block
from cognexis.cortex_layers.cells.agalite import AGaLiTeCell
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.composed import BlockCell, SequentialCell, StackCell
from cognexis.cortex_layers.cells.conv import CausalConv1d
from cognexis.cortex_layers.cells.core.axon_cell import AxonCell
from cognexis.cortex_layers.cells.core.axon_layer import AxonLayer, update_parent_state
from cognexis.cortex_layers.cells.gru import GRUCell
from cognexis.cortex_layers.cells.hf_llama import HFLlamaLayerCell
from cognexis.cortex_layers.cells.lstm import LSTMCell
from cognexis.cortex_layers.cells.mlstm import mLSTMCell
from cognexis.cortex_layers.cells.registry import build_cell, get_cell_class, register_cell
from cognexis.cortex_layers.cells.slstm import sLSTMCell
from cognexis.cortex_layers.cells.xl import XLCell
from cognexis.cortex_layers.config import (
    AdapterBlockConfig,
    AGaLiTeCellConfig,
    AxonConfig,
    BlockCellConfig,
    BlockConfig,
    CausalConv1dConfig,
    CellConfig,
    ColumnBlockConfig,
    CortexStackConfig,
    GRUCellConfig,
    HFLlamaLayerConfig,
    LSTMCellConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
    PostUpGatedBlockConfig,
    PreUpBlockConfig,
    RouterConfig,
    SequentialCellConfig,
    StackCellConfig,
    XLCellConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)
from cognexis.cortex_layers.registry import register_token
from cognexis.cortex_layers.stacks.auto import build_cortex_auto_config, build_cortex_auto_stack
from cognexis.cortex_layers.stacks.base import CortexStack
from cognexis.cortex_layers.stacks.build import build_cortex, build_from_dict
from cognexis.cortex_layers.state import detach_state
from cognexis.cortex_layers.types import MaybeState, ResetMask, State, Tensor
from cognexis.cortex_layers.utils import TRITON_AVAILABLE, select_backend

SURFACE: dict[str, Any] = {
    "AGaLiTeCell": AGaLiTeCell,
    "AGaLiTeCellConfig": AGaLiTeCellConfig,
    "AdapterBlock": AdapterBlock,
    "AdapterBlockConfig": AdapterBlockConfig,
    "AxonCell": AxonCell,
    "AxonConfig": AxonConfig,
    "AxonLayer": AxonLayer,
    "BaseBlock": BaseBlock,
    "BlockCell": BlockCell,
    "BlockCellConfig": BlockCellConfig,
    "BlockConfig": BlockConfig,
    "CausalConv1d": CausalConv1d,
    "CausalConv1dConfig": CausalConv1dConfig,
    "CellConfig": CellConfig,
    "ColumnBlock": ColumnBlock,
    "ColumnBlockConfig": ColumnBlockConfig,
    "CortexStack": CortexStack,
    "CortexStackConfig": CortexStackConfig,
    "GRUCell": GRUCell,
    "GRUCellConfig": GRUCellConfig,
    "HFLlamaLayerCell": HFLlamaLayerCell,
    "HFLlamaLayerConfig": HFLlamaLayerConfig,
    "LSTMCell": LSTMCell,
    "LSTMCellConfig": LSTMCellConfig,
    "MaybeState": MaybeState,
    "MemoryCell": MemoryCell,
    "PassThroughBlock": PassThroughBlock,
    "PassThroughBlockConfig": PassThroughBlockConfig,
    "PostUpBlock": PostUpBlock,
    "PostUpBlockConfig": PostUpBlockConfig,
    "PostUpGatedBlock": PostUpGatedBlock,
    "PostUpGatedBlockConfig": PostUpGatedBlockConfig,
    "PreUpBlock": PreUpBlock,
    "PreUpBlockConfig": PreUpBlockConfig,
    "ResetMask": ResetMask,
    "RouterConfig": RouterConfig,
    "SequentialCell": SequentialCell,
    "SequentialCellConfig": SequentialCellConfig,
    "StackCell": StackCell,
    "StackCellConfig": StackCellConfig,
    "State": State,
    "TRITON_AVAILABLE": TRITON_AVAILABLE,
    "Tensor": Tensor,
    "XLCell": XLCell,
    "XLCellConfig": XLCellConfig,
    "build_block": build_block,
    "build_cell": build_cell,
    "build_column_auto_block": build_column_auto_block,
    "build_column_auto_config": build_column_auto_config,
    "build_cortex": build_cortex,
    "build_cortex_auto_config": build_cortex_auto_config,
    "build_cortex_auto_stack": build_cortex_auto_stack,
    "build_from_dict": build_from_dict,
    "detach_state": detach_state,
    "get_block_class": get_block_class,
    "get_cell_class": get_cell_class,
    "mLSTMCell": mLSTMCell,
    "mLSTMCellConfig": mLSTMCellConfig,
    "register_block": register_block,
    "register_cell": register_cell,
    "register_token": register_token,
    "sLSTMCell": sLSTMCell,
    "sLSTMCellConfig": sLSTMCellConfig,
    "select_backend": select_backend,
    "update_parent_state": update_parent_state,
}
