"""A cell small enough to be right by inspection, for tests of what stands around cells."""

import torch
from tensordict import TensorDict

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.registry import register_cell
from cognexis.cortex_layers.config import CellConfig
from cognexis.cortex_layers.state import check_input, has_keys, normalise_resets


class LeakyCellConfig(CellConfig):
    """A decaying sum per channel."""

    cell_type: str = "leaky"
    decay: float = 0.5


@register_cell(LeakyCellConfig)
class LeakyCell(MemoryCell):
    """s_t = decay * keep_t * s_{t-1} + w * x_t, y_t = s_t; one loop over time, and a count of the tokens."""

    def __init__(self, config: LeakyCellConfig) -> None:
        super().__init__(config.hidden_size)
        self.decay = config.decay
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, config.hidden_size))

    def init_state(self, batch, *, device, dtype):
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        return TensorDict(
            {
                "sum": torch.zeros(batch, self.hidden_size, device=device, dtype=wide),
                "count": torch.full((batch,), 1, device=device, dtype=torch.long),
            },
            batch_size=[batch],
        )

    def forward(self, x, state, *, resets=None):
        is_step = check_input(x, self.hidden_size, "LeakyCell")
        mask = normalise_resets(resets, x, "LeakyCell")
        if not has_keys(state, "sum", "count"):
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        total, count = state["sum"], state["count"]
        tokens = x[:, None] if is_step else x
        outputs = [tokens[:, :0]]
        for t in range(tokens.shape[1]):
            if mask is not None:
                fresh = mask if is_step else mask[:, t]
                total, count = total * ~fresh[:, None], torch.where(fresh, 1, count)
            total, count = self.decay * total + self.weight * tokens[:, t], count + 1
            outputs.append(total[:, None].to(x.dtype))
        y = torch.cat(outputs, 1)
        return (y[:, 0] if is_step else y), TensorDict({"sum": total, "count": count}, batch_size=[x.shape[0]])
