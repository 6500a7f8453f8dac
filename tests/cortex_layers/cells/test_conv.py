import pytest
import torch
from torch import nn

from cognexis.cortex_layers.cells.conv import CausalConv1d
from cognexis.cortex_layers.config import CausalConv1dConfig
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised

CELLS = {
    "depthwise": {},
    "dense": {"channel_mixing": True},
    "one_tap_no_bias": {"kernel_size": 1, "causal_conv_bias": False},
    "identity": {"kernel_size": 0},
}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
def test_cell_keeps_the_shared_rules(holds, kind):
    holds(Unit(randomised(CausalConv1d(CausalConv1dConfig(hidden_size=6, **CELLS[kind])))))


@pytest.mark.parametrize("mixing", [False, True])
def test_output_equals_a_padded_convolution(mixing):
    cell = CausalConv1d(CausalConv1dConfig(hidden_size=6, channel_mixing=mixing)).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = cell.conv(nn.functional.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)
    torch.testing.assert_close(cell(x, None)[0], expected)


def test_state_holds_the_last_inputs_oldest_first():
    cell = CausalConv1d(CausalConv1dConfig(hidden_size=2, kernel_size=4))
    x = torch.randn(1, 7, 2)
    assert torch.equal(cell(x, None)[1]["conv"], x[:, 3:])
    short = cell(x[:, :2], None)[1]["conv"]
    assert torch.equal(short[:, 2:], x[:, :2]) and not short[:, :2].any()


def test_missing_hidden_size_is_named():
    with pytest.raises(ValueError, match="hidden_size"):
        CausalConv1d(CausalConv1dConfig())
