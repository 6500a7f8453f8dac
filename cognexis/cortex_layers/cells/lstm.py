"""The LSTM as a cell: ``torch.nn.LSTM`` with a state of rows and resets.

The equations stand in ``cognexis.kernels.lstm``. State: ``h`` and ``c [B, L, H]``. Weight matrices start orthogonal
and every bias at one; there are two bias vectors, so a gate starts with two.

Letters: B batch, T time, H hidden, L layers.
"""

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.torch_layers import recurrent_layer
from cognexis.cortex_layers.config import LSTMCellConfig
from cognexis.cortex_layers.state import accumulator_dtype, as_sequence, has_keys
from cognexis.cortex_layers.types import MaybeState, ResetMask
from cognexis.kernels.lstm import lstm_sequence


class LSTMCell(MemoryCell):
    """Long short-term memory of one or more layers.

    Args:
        cfg: ``proj_size`` must be zero, since input and output of a cell have one width.
    """

    def __init__(self, cfg: LSTMCellConfig) -> None:
        super().__init__(cfg.hidden_size)  # type: ignore[arg-type]
        if cfg.proj_size:
            raise ValueError(f"LSTMCell: proj_size={cfg.proj_size}: must be 0")
        self.cfg = cfg
        self.net = recurrent_layer(nn.LSTM, cfg, bias=1.0)

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> TensorDict:
        shape = (batch, self.cfg.num_layers, self.hidden_size)
        return TensorDict(
            {
                "h": torch.zeros(shape, device=device, dtype=dtype),
                "c": torch.zeros(shape, device=device, dtype=accumulator_dtype(dtype)),
            },
            batch_size=[batch],
            device=device,
        )

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        x, mask, is_step = as_sequence(x, state, resets, self.hidden_size, "LSTMCell")
        if state is None or not has_keys(state, "h", "c"):
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        y, h, c = lstm_sequence(self.net, x, state["h"], state["c"], mask)
        next_state = TensorDict({"h": h, "c": c}, batch_size=[x.shape[0]], device=x.device)
        return y[:, 0] if is_step else y, next_state


__all__ = ["LSTMCell"]
