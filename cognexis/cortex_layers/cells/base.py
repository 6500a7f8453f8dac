"""The interface of every memory cell."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.state import replace_rows
from cognexis.cortex_layers.types import MaybeState, ResetMask


class MemoryCell(nn.Module, ABC):
    """A recurrence over time at a fixed width.

    Args:
        hidden_size: width H of input and output.

    A subclass must define ``forward``; one with a state of its own also ``init_state``. ``reset_state`` takes rows
    from a fresh state by default.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        if hidden_size is None or hidden_size < 1:
            raise ValueError(f"{type(self).__name__}: hidden_size={hidden_size!r}: must be a positive integer")
        self.hidden_size = hidden_size

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> TensorDict:
        """A fresh state for ``batch`` rows; empty unless the cell defines its own."""
        return TensorDict({}, batch_size=[batch], device=device)

    @abstractmethod
    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        """Consume ``[B, H]`` or ``[B, T, H]``; return output of the same form and the new state.

        Args:
            state: None, or one that lacks the cell's keys, means fresh; it is never changed.
            resets: see ``ResetMask``.
        """

    def reset_state(self, state: MaybeState, mask: Tensor) -> MaybeState:
        """A state whose rows of ``mask`` ``[B]`` are fresh; the argument stays as it is."""
        if state is None:
            return None
        tensors: list[Any] = list(state.values(True, True))
        floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        device = tensors[0].device if tensors else "cpu"
        dtype = floating[0] if floating else torch.float32
        return replace_rows(state, mask, self.init_state(state.batch_size[0], device=device, dtype=dtype))
