"""Calls of blocks, compiled where that was asked for and works.

A compiled block is used while gradients are enabled; without them, and where compilation fails, the block runs as it
is. Compiled forms are no modules of the stack: they are in no state_dict, and copies of a stack compile anew.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from cognexis.cortex_layers.types import MaybeState

logger = logging.getLogger(__name__)


class BlockCaller:
    """Runs the blocks of one stack or column.

    Args:
        compiles: whether to use ``torch.compile``.
    """

    def __init__(self, compiles: bool = False) -> None:
        self.compiles = compiles
        self._compiled: dict[int, Any] = {}

    def __call__(
        self, block: nn.Module, x: Tensor, state: MaybeState, resets: Tensor | None
    ) -> tuple[Tensor, MaybeState]:
        """``block(x, state, resets=resets)``."""
        if not self.compiles or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return block(x, state, resets=resets)
        key = id(block)
        if key not in self._compiled:
            self._compiled[key] = torch.compile(block)
        compiled = self._compiled[key]
        if compiled is None:
            return block(x, state, resets=resets)
        try:
            return compiled(x, state, resets=resets)
        except Exception as error:
            result = block(x, state, resets=resets)  # a fault of the caller is raised here, in its own words
            logger.warning("%s runs uncompiled: %s", type(block).__name__, error)
            self._compiled[key] = None
            return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockCaller":
        return BlockCaller(self.compiles)

    def __getstate__(self) -> dict[str, Any]:
        return {"compiles": self.compiles, "_compiled": {}}
