"""A causal convolution as a cell: the last K inputs are its memory.

    y_t = sum_k W[:, :, k] * b_t[k] + bias,   b_t = the last K inputs up to x_t, oldest first

Before the start and before the last reset b_t is zero. State: ``conv [B, K, H]``. ``kernel_size=0`` is the identity
and has no state. Weights start as those of ``torch.nn.Conv1d``.

Letters: B batch, T time, H hidden, K taps.
"""

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import CausalConv1dConfig
from cognexis.cortex_layers.state import as_sequence, has_keys
from cognexis.cortex_layers.types import MaybeState, ResetMask
from cognexis.kernels.conv import causal_conv


class CausalConv1d(MemoryCell):
    """Causal convolution over time.

    Args:
        cfg: ``channel_mixing`` chooses a dense convolution over a depthwise one.
    """

    def __init__(self, cfg: CausalConv1dConfig) -> None:
        super().__init__(cfg.hidden_size)  # type: ignore[arg-type]
        self.cfg = cfg
        self.conv: nn.Conv1d | None = None
        if cfg.kernel_size:
            groups = 1 if cfg.channel_mixing else self.hidden_size
            self.conv = nn.Conv1d(
                self.hidden_size, self.hidden_size, cfg.kernel_size, groups=groups, bias=cfg.causal_conv_bias
            )

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> TensorDict:
        state = TensorDict({}, batch_size=[batch], device=device)
        if self.conv is not None:
            state["conv"] = torch.zeros(batch, self.cfg.kernel_size, self.hidden_size, device=device, dtype=dtype)
        return state

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        x, mask, is_step = as_sequence(x, state, resets, self.hidden_size, "CausalConv1d")
        if self.conv is None:
            fresh = TensorDict({}, batch_size=[x.shape[0]], device=x.device)
            return x[:, 0] if is_step else x, fresh if state is None else state
        if state is None or not has_keys(state, "conv"):
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        if type(self.conv) is not nn.Conv1d:
            raise ValueError(
                f"CausalConv1d: the convolution was replaced by {type(self.conv).__name__}, which would not be used; "
                "leave it out of an adapter's target modules"
            )
        y, window = causal_conv(x, state["conv"], self.conv.weight, self.conv.bias, mask)
        return y[:, 0] if is_step else y, TensorDict({"conv": window}, batch_size=[x.shape[0]], device=x.device)


__all__ = ["CausalConv1d"]
