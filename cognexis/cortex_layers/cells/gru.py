"""The GRU as a cell: ``torch.nn.GRU`` with a state of rows and resets.

The equations stand in ``cognexis.kernels.lstm``. State: ``h [B, L, H]``. Weight matrices start orthogonal and biases
at zero: both vectors of the candidate would shift it in one direction otherwise.

Letters: B batch, T time, H hidden, L layers.
"""

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.torch_layers import recurrent_layer
from cognexis.cortex_layers.config import GRUCellConfig
from cognexis.cortex_layers.state import as_sequence, has_keys
from cognexis.cortex_layers.types import MaybeState, ResetMask
from cognexis.kernels.lstm import gru_sequence


class GRUCell(MemoryCell):
    """Gated recurrent unit of one or more layers."""

    def __init__(self, cfg: GRUCellConfig) -> None:
        super().__init__(cfg.hidden_size)  # type: ignore[arg-type]
        self.cfg = cfg
        self.net = recurrent_layer(nn.GRU, cfg, bias=0.0)

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> TensorDict:
        h = torch.zeros(batch, self.cfg.num_layers, self.hidden_size, device=device, dtype=dtype)
        return TensorDict({"h": h}, batch_size=[batch], device=device)

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        x, mask, is_step = as_sequence(x, state, resets, self.hidden_size, "GRUCell")
        if state is None or not has_keys(state, "h"):
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        y, h = gru_sequence(self.net, x, state["h"], mask)
        return y[:, 0] if is_step else y, TensorDict({"h": h}, batch_size=[x.shape[0]], device=x.device)


__all__ = ["GRUCell"]
