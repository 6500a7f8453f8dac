"""Stacks from configurations."""

import functools
import os
import warnings
from collections.abc import Mapping
from typing import Any

from cognexis.cortex_layers.blocks.adapter import AdapterBlock
from cognexis.cortex_layers.blocks.column.column import ColumnBlock
from cognexis.cortex_layers.blocks.passthrough import PassThroughBlock
from cognexis.cortex_layers.blocks.postup import PostUpBlock
from cognexis.cortex_layers.blocks.postup_gated import PostUpGatedBlock
from cognexis.cortex_layers.blocks.preup import PreUpBlock
from cognexis.cortex_layers.cells import CELLS
from cognexis.cortex_layers.config import CortexStackConfig
from cognexis.cortex_layers.stacks.base import CortexStack

# Importing a class registers it; this is what every configuration can name.
BUILT_IN_CELLS = tuple(CELLS.values())
BUILT_IN_BLOCKS = (PassThroughBlock, PreUpBlock, PostUpBlock, PostUpGatedBlock, AdapterBlock, ColumnBlock)
_IGNORED_VARIABLE = "CORTEX_TRITON_SMEM_SOFT_LIMIT"


def build_cortex(config: CortexStackConfig) -> CortexStack:
    """Build a stack; the sizes of all cells follow from its ``d_hidden``."""
    _warn_about_ignored_variable()
    return CortexStack(config)


def build_from_dict(data: Mapping[str, Any]) -> CortexStack:
    """Build a stack from a dumped configuration.

    Raises:
        ValidationError: an unknown tag or field, or an impossible value.
    """
    return build_cortex(CortexStackConfig.model_validate(dict(data)))


@functools.cache
def _warn_about_ignored_variable() -> None:
    if os.environ.get(_IGNORED_VARIABLE):
        warnings.warn(f"{_IGNORED_VARIABLE} is ignored", DeprecationWarning, stacklevel=3)
