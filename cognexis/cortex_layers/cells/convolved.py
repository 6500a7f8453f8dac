"""What the mLSTM and the sLSTM share: a causal convolution in front, and AxonLayers beside their own memories.

    xc = SiLU(conv(x))                           (xc = x without a convolution)
    y, memories = recurrence(x, xc, memories)

State: the memories, ``conv [B, K, H]`` unless the convolution is off, and the groups of the AxonLayers.

Letters: B batch, T time, H hidden, K taps.
"""

from abc import abstractmethod

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.conv import CausalConv1d
from cognexis.cortex_layers.cells.core.axon_layer import AxonLayer, update_parent_state
from cognexis.cortex_layers.config import CausalConv1dConfig
from cognexis.cortex_layers.state import as_sequence, has_keys
from cognexis.cortex_layers.types import MaybeState, ResetMask


class ConvolvedCell(MemoryCell):
    """A recurrence behind a causal convolution.

    Args:
        hidden_size: H.
        kernel_size: K; 0 for no convolution.
    """

    memory_keys: tuple[str, ...]

    def __init__(self, hidden_size: int, kernel_size: int) -> None:
        super().__init__(hidden_size)
        self.conv: CausalConv1d | None = None
        if kernel_size:
            self.conv = CausalConv1d(CausalConv1dConfig(hidden_size=hidden_size, kernel_size=kernel_size))

    @abstractmethod
    def fresh_memories(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """What ``memory_keys`` name, for ``batch`` fresh rows."""

    @abstractmethod
    def recur(
        self, x: Tensor, mixed: Tensor, parent: TensorDict, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Consume ``[B, T, H]``, T at least 1.

        Args:
            mixed: x behind the convolution.
            parent: the memories, and what AxonLayers may write into.
            mask: bool ``[B, T]``.

        Returns:
            The output and the new memories.
        """

    def init_state(
        self, batch: int, *, device: torch.device | str, dtype: torch.dtype, traces: bool = True
    ) -> TensorDict:
        """A fresh state; ``traces`` concerns the AxonLayers."""
        memories = self.fresh_memories(batch, device=device, dtype=dtype)
        state = TensorDict(memories, batch_size=[batch], device=device)
        if self.conv is not None:
            state.update(self.conv.init_state(batch, device=device, dtype=dtype))
        for layer in self.children():
            if isinstance(layer, AxonLayer):
                layer.init_into(state, batch, device, dtype, traces)
        return state

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        x, mask, is_step = as_sequence(x, state, resets, self.hidden_size, type(self).__name__)
        needed = self.memory_keys if self.conv is None else (*self.memory_keys, "conv")
        if state is None or not has_keys(state, *needed):
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        if not x.shape[1]:
            return x, state
        parent = state.copy()  # AxonLayers write into it
        next_state = TensorDict({}, batch_size=[x.shape[0]], device=x.device)
        mixed = x
        if self.conv is not None:
            mixed, window = self.conv(x, state, resets=mask)
            mixed = F.silu(mixed)
            next_state.update(window)
        y, memories = self.recur(x, mixed, parent, mask)
        update_parent_state(next_state.update(memories), parent)
        return y[:, 0] if is_step else y, next_state


__all__ = ["ConvolvedCell"]
