"""The checks of state that all cells share."""

import pytest
import torch

from cognexis.cortex_layers import config
from cognexis.cortex_layers.cells import build_cell
from cognexis.cortex_layers.stacks import build_cortex_auto_stack

CELLS = {
    "AGaLiTeCell": config.AGaLiTeCellConfig(hidden_size=8, n_heads=2),
    "AxonCell": config.AxonConfig(hidden_size=8),
    "CausalConv1d": config.CausalConv1dConfig(hidden_size=8),
    "GRUCell": config.GRUCellConfig(hidden_size=8),
    "LSTMCell": config.LSTMCellConfig(hidden_size=8),
    "XLCell": config.XLCellConfig(hidden_size=8, n_heads=2),
    "mLSTMCell": config.mLSTMCellConfig(hidden_size=8, num_heads=2),
    "sLSTMCell": config.sLSTMCellConfig(hidden_size=8, num_heads=2),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_refuses_a_state_on_another_device(name):
    cell = build_cell(CELLS[name])
    state = cell.init_state(2, device="meta", dtype=torch.float32)
    for x in (torch.zeros(2, 8), torch.zeros(2, 3, 8)):
        with pytest.raises(ValueError, match=f"{name}: state on device meta, expected cpu as the input"):
            cell(x, state)


def test_a_stack_refuses_a_state_on_another_device():
    stack = build_cortex_auto_stack(d_hidden=8, num_layers=1, pattern="LA")
    for state_device, x_device in (("meta", "cpu"), ("cpu", "meta")):
        state = stack.init_state(2, device=state_device)
        x = torch.zeros(2, 3, 8, device=x_device)
        with pytest.raises(
            ValueError, match=f"CortexStack: state on device {state_device}, expected {x_device} as the input"
        ):
            stack(x, state)
