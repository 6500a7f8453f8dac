import pytest
import torch

from cognexis.cortex_layers.cells.lstm import LSTMCell
from cognexis.cortex_layers.config import LSTMCellConfig
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised

CELLS = {"one_layer": {}, "two_layers_no_bias": {"num_layers": 2, "bias": False}}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
def test_cell_keeps_the_shared_rules(holds, kind):
    holds(Unit(randomised(LSTMCell(LSTMCellConfig(hidden_size=6, **CELLS[kind])))))


def test_without_resets_it_is_torchs_layer():
    cell = LSTMCell(LSTMCellConfig(hidden_size=6, num_layers=2))
    x = torch.randn(2, 5, 6)
    y, state = cell(x, None)
    expected, (h, c) = cell.net(x)
    assert torch.equal(y, expected)
    assert torch.equal(state["h"], h.transpose(0, 1)) and torch.equal(state["c"], c.transpose(0, 1))
    assert state["h"].shape == (2, 2, 6)


def test_weights_start_orthogonal_and_biases_at_one():
    net = LSTMCell(LSTMCellConfig(hidden_size=6)).net
    for weight in (net.weight_ih_l0, net.weight_hh_l0):
        torch.testing.assert_close(weight.T @ weight, torch.eye(6))
    assert (net.bias_ih_l0 == 1).all() and (net.bias_hh_l0 == 1).all()


def test_projection_is_refused():
    with pytest.raises(ValueError, match="proj_size=3"):
        LSTMCell(LSTMCellConfig(hidden_size=6, proj_size=3))


def test_missing_hidden_size_is_named():
    with pytest.raises(ValueError, match="hidden_size"):
        LSTMCell(LSTMCellConfig())


def test_dropout_acts_between_layers_in_training_only():
    cell = LSTMCell(LSTMCellConfig(hidden_size=6, num_layers=2, dropout=0.5))
    x = torch.randn(2, 5, 6)
    resets = torch.rand(2, 5) < 0.5
    assert not torch.equal(cell(x, None, resets=resets)[0], cell(x, None, resets=resets)[0])
    cell.eval()
    assert torch.equal(cell(x, None)[0], cell(x, None)[0])
