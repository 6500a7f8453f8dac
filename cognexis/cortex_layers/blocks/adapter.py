"""Adapter block: a bottleneck added to another block.

    y = wrapped_block(x)
    out = y + gate * up(dropout(act(down(ln(y)))))

The gate starts at zero, so the block starts as exactly the wrapped one. ``up`` starts small and not at zero: with
both at zero neither would ever get a gradient. The state is ``{"wrapped": state of the wrapped block}``. D width of
the stack.
Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; the gate is of ReZero (Bachlechner 2020).
"""

import math

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.blocks.base import BaseBlock, child_state, parent_state
from cognexis.cortex_layers.blocks.registry import build_block, build_block_at_width, register_block
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import AdapterBlockConfig
from cognexis.cortex_layers.state import fresh_state
from cognexis.cortex_layers.types import MaybeState, ResetMask

_ADAPTER_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}
_WRAPPED = "wrapped"


@register_block(AdapterBlockConfig)
class AdapterBlock(BaseBlock):
    """A trainable residual around any block, columns included.

    Args:
        cell: a cell for the wrapped block; None builds the one of its configuration.
    """

    def __init__(self, config: AdapterBlockConfig, d_hidden: int, cell: MemoryCell | None = None) -> None:
        super().__init__(d_hidden)
        base = config.base_block
        self.wrapped_block = (
            build_block_at_width(base, d_hidden) if cell is None else build_block(base, d_hidden, cell)
        )
        self.ln = nn.LayerNorm(d_hidden)
        self.down = nn.Linear(d_hidden, config.bottleneck)
        self.act = _ADAPTER_ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, d_hidden)
        self.gate = nn.Parameter(torch.zeros(d_hidden if config.per_channel_gate else ()))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.normal_(self.up.weight, std=0.02)
        nn.init.zeros_(self.up.bias)

    @property
    def cell(self) -> MemoryCell | None:  # type: ignore[override]
        """The cell of the wrapped block, which holds it."""
        return self.wrapped_block.cell

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        y, wrapped = self.wrapped_block(x, child_state(state, _WRAPPED), resets=resets)
        y = y + self.gate * self.up(self.dropout(self.act(self.down(self.ln(y)))))
        return y, parent_state({_WRAPPED: wrapped}, x.shape[0])

    def init_state(
        self, batch: int, *, device: torch.device | str, dtype: torch.dtype, traces: bool = True
    ) -> TensorDict:
        wrapped = fresh_state(self.wrapped_block, batch, device=device, dtype=dtype, traces=traces)
        return parent_state({_WRAPPED: wrapped}, batch)

    def reset_state(self, state: MaybeState, mask: Tensor) -> MaybeState:
        wrapped = child_state(state, _WRAPPED)
        if state is None or wrapped is None:
            return state
        return parent_state({_WRAPPED: self.wrapped_block.reset_state(wrapped, mask)}, state.batch_size[0])
