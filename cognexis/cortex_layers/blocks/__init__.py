"""Blocks: what stands around a cell at the stack's width."""

from cognexis.cortex_layers.blocks.adapter import AdapterBlock
from cognexis.cortex_layers.blocks.base import BaseBlock
from cognexis.cortex_layers.blocks.column.auto import build_column_auto_block, build_column_auto_config
from cognexis.cortex_layers.blocks.column.column import ColumnBlock
from cognexis.cortex_layers.blocks.passthrough import PassThroughBlock
from cognexis.cortex_layers.blocks.postup import PostUpBlock
from cognexis.cortex_layers.blocks.postup_gated import PostUpGatedBlock
from cognexis.cortex_layers.blocks.preup import PreUpBlock
from cognexis.cortex_layers.blocks.registry import (
    build_block,
    get_block_class,
    get_block_config_class,
    register_block,
)

__all__ = [
    "AdapterBlock",
    "BaseBlock",
    "ColumnBlock",
    "PassThroughBlock",
    "PostUpBlock",
    "PostUpGatedBlock",
    "PreUpBlock",
    "build_block",
    "build_column_auto_block",
    "build_column_auto_config",
    "get_block_class",
    "get_block_config_class",
    "register_block",
]
