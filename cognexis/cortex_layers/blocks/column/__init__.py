"""Columns: experts side by side, mixed by a router."""

from cognexis.cortex_layers.blocks.column.auto import build_column_auto_block, build_column_auto_config
from cognexis.cortex_layers.blocks.column.column import ColumnBlock
from cognexis.cortex_layers.blocks.column.routers import BaseRouter, GlobalContextRouter, TokenRefiner

__all__ = [
    "BaseRouter",
    "ColumnBlock",
    "GlobalContextRouter",
    "TokenRefiner",
    "build_column_auto_block",
    "build_column_auto_config",
]
