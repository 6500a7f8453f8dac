import pytest
import torch

from cognexis.cortex_layers.cells.gru import GRUCell
from cognexis.cortex_layers.config import GRUCellConfig
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised

CELLS = {"one_layer": {}, "two_layers_no_bias": {"num_layers": 2, "bias": False}}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
def test_cell_keeps_the_shared_rules(holds, kind):
    holds(Unit(randomised(GRUCell(GRUCellConfig(hidden_size=6, **CELLS[kind])))))


def test_without_resets_it_is_torchs_layer():
    cell = GRUCell(GRUCellConfig(hidden_size=6, num_layers=2))
    x = torch.randn(2, 5, 6)
    y, state = cell(x, None)
    expected, h = cell.net(x)
    assert torch.equal(y, expected) and torch.equal(state["h"], h.transpose(0, 1))
    assert list(state.keys()) == ["h"] and state["h"].shape == (2, 2, 6)


def test_missing_hidden_size_is_named():
    with pytest.raises(ValueError, match="hidden_size"):
        GRUCell(GRUCellConfig())


def test_dropout_acts_between_layers_in_training_only():
    cell = GRUCell(GRUCellConfig(hidden_size=6, num_layers=2, dropout=0.5))
    x = torch.randn(2, 5, 6)
    resets = torch.rand(2, 5) < 0.5
    assert not torch.equal(cell(x, None, resets=resets)[0], cell(x, None, resets=resets)[0])
    cell.eval()
    assert torch.equal(cell(x, None)[0], cell(x, None)[0])
