"""Stack: blocks in sequence at one width, and a norm behind them.

y = norm(block_n(... block_0(x))). The state is ``{"<class of the block>_<i>": state of block i}``. Letters: B batch,
T time, D width.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.blocks.base import child_state, parent_state
from cognexis.cortex_layers.blocks.column.column import ColumnBlock
from cognexis.cortex_layers.blocks.compiled import BlockCaller
from cognexis.cortex_layers.blocks.registry import build_block_at_width
from cognexis.cortex_layers.config import CortexStackConfig
from cognexis.cortex_layers.state import check_device, check_input, fresh_state, normalise_resets
from cognexis.cortex_layers.types import MaybeState, ResetMask


class CortexStack(nn.Module):
    """The whole memory: called like one cell."""

    def __init__(self, config: CortexStackConfig) -> None:
        super().__init__()
        self.config = config
        self.d_hidden = config.d_hidden
        self.blocks: Any = nn.ModuleList(build_block_at_width(block, config.d_hidden) for block in config.blocks)
        self.norm = nn.LayerNorm(config.d_hidden) if config.post_norm else nn.Identity()
        self.block_keys = [f"{type(block).__name__}_{i}" for i, block in enumerate(self.blocks)]
        self.caller = BlockCaller(config.compile_blocks)
        for block in self.blocks:
            if isinstance(block, ColumnBlock):
                block.caller = BlockCaller(config.compile_blocks)

    @property
    def cfg(self) -> CortexStackConfig:
        """Another name of ``config``."""
        return self.config

    def forward(
        self, x: Tensor, state: MaybeState = None, *, resets: ResetMask | None = None
    ) -> tuple[Tensor, TensorDict]:
        """Consume ``[B, D]`` or ``[B, T, D]``; return output of the same form and the new state.

        Args:
            state: None means fresh; it is never changed.
            resets: see ``ResetMask``.

        Raises:
            ValueError: a shape does not fit, or the state lies on another device.
        """
        check_input(x, self.d_hidden, "CortexStack")
        mask = normalise_resets(resets, x, "CortexStack")
        if state is not None and state.batch_size[:1] != x.shape[:1]:
            raise ValueError(
                f"CortexStack: state of batch size {list(state.batch_size)}, expected [{x.shape[0]}] as in the input"
            )
        check_device(state, x, "CortexStack")
        states: dict[str, MaybeState] = {}
        for key, block in zip(self.block_keys, self.blocks, strict=True):
            inner = child_state(state, key)
            if isinstance(block, ColumnBlock):  # compiles its experts itself
                x, states[key] = block(x, inner, resets=mask)
            else:
                x, states[key] = self.caller(block, x, inner, mask)
        return self.norm(x), parent_state(states, x.shape[0])

    def step(self, x: Tensor, state: MaybeState = None, **kwargs: Any) -> tuple[Tensor, TensorDict]:
        """Another name of calling the stack, for one step ``[B, D]``."""
        return self(x, state, **kwargs)

    def init_state(
        self,
        batch: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        traces: bool = True,
    ) -> TensorDict:
        """A fresh state for ``batch`` rows, complete from the start.

        Args:
            traces: keep what Axon parts need for the gradient before a cut; inference does without.
        """
        pairs = zip(self.block_keys, self.blocks, strict=True)
        return parent_state(
            {key: fresh_state(block, batch, device=device, dtype=dtype, traces=traces) for key, block in pairs}, batch
        )

    def reset_state(self, state: MaybeState, mask: Tensor) -> MaybeState:
        """A state whose rows of ``mask`` ``[B]`` are fresh; the argument stays as it is."""
        if state is None:
            return None
        pairs = zip(self.block_keys, self.blocks, strict=True)
        return parent_state(
            {key: block.reset_state(child_state(state, key), mask) for key, block in pairs}, state.batch_size[0]
        )
