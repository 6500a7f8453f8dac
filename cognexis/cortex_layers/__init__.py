"""Memory cells and what is built from them: blocks, columns, stacks.

    stack = build_cortex_auto_stack(d_hidden=256, pattern="AXMS")
    y, state = stack(x)                    # x [B, T, 256]
    y, state = stack.step(x_t, state)      # x_t [B, 256]

The names below load when one of them is first used, so that the configurations alone need neither torch modules nor
tensordict.
"""

from typing import Any

__all__ = [
    "AGaLiTeCell",
    "AGaLiTeCellConfig",
    "AdapterBlock",
    "AdapterBlockConfig",
    "AxonCell",
    "AxonConfig",
    "AxonLayer",
    "BaseBlock",
    "BlockCell",
    "BlockCellConfig",
    "BlockConfig",
    "CausalConv1d",
    "CausalConv1dConfig",
    "CellConfig",
    "ColumnBlock",
    "ColumnBlockConfig",
    "CortexStack",
    "CortexStackConfig",
    "GRUCell",
    "GRUCellConfig",
    "HFLlamaLayerCell",
    "HFLlamaLayerConfig",
    "LSTMCell",
    "LSTMCellConfig",
    "MaybeState",
    "MemoryCell",
    "PassThroughBlock",
    "PassThroughBlockConfig",
    "PostUpBlock",
    "PostUpBlockConfig",
    "PostUpGatedBlock",
    "PostUpGatedBlockConfig",
    "PreUpBlock",
    "PreUpBlockConfig",
    "ResetMask",
    "RouterConfig",
    "SequentialCell",
    "SequentialCellConfig",
    "StackCell",
    "StackCellConfig",
    "State",
    "TRITON_AVAILABLE",
    "Tensor",
    "XLCell",
    "XLCellConfig",
    "build_block",
    "build_cell",
    "build_column_auto_block",
    "build_column_auto_config",
    "build_cortex",
    "build_cortex_auto_config",
    "build_cortex_auto_stack",
    "build_from_dict",
    "detach_state",
    "get_block_class",
    "get_cell_class",
    "mLSTMCell",
    "mLSTMCellConfig",
    "register_block",
    "register_cell",
    "register_token",
    "sLSTMCell",
    "sLSTMCellConfig",
    "select_backend",
    "update_parent_state",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cognexis.cortex_layers.surface import SURFACE

    return SURFACE[name]


def __dir__() -> list[str]:
    return __all__
