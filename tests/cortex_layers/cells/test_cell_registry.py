import pytest
import torch

from cognexis.cortex_layers.cells import CELLS
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.lstm import LSTMCell
from cognexis.cortex_layers.cells.registry import build_cell, get_cell_class, get_cell_config_class, register_cell
from cognexis.cortex_layers.config import CellConfig, LSTMCellConfig, PassThroughBlockConfig


class EchoConfig(CellConfig):
    cell_type: str = "echo"


class EchoCell(MemoryCell):
    def __init__(self, cfg):
        super().__init__(cfg.hidden_size)

    def forward(self, x, state, *, resets=None):
        return x, state


def test_every_entry_of_the_table_is_found_by_configuration_and_tag():
    for config_class, cell_class in CELLS.items():
        assert get_cell_config_class(config_class.model_fields["cell_type"].default) is config_class
        if "hidden_size" in config_class.model_fields and not any(
            field.is_required() for field in config_class.model_fields.values()
        ):
            assert get_cell_class(config_class()) is cell_class


def test_cell_is_built_from_its_configuration():
    cell = build_cell(LSTMCellConfig(hidden_size=6))
    assert type(cell) is LSTMCell and cell.hidden_size == 6


def test_registered_cell_is_built_also_from_json():
    register_cell(EchoConfig)(EchoCell)
    cfg = PassThroughBlockConfig.model_validate({"cell": {"cell_type": "echo", "hidden_size": 4}}).cell
    cell = build_cell(cfg)
    assert type(cell) is EchoCell
    assert cell.init_state(2, device="cpu", dtype=torch.float32).batch_size == (2,)
    register_cell(EchoConfig)(EchoCell)  # once more changes nothing


def test_configuration_of_another_cell_is_refused_unless_overridden():
    register_cell(EchoConfig)(EchoCell)

    class OtherCell(EchoCell):
        pass

    with pytest.raises(ValueError, match="builds EchoCell already"):
        register_cell(EchoConfig)(OtherCell)
    register_cell(EchoConfig, override=True)(OtherCell)
    assert get_cell_class(EchoConfig(hidden_size=4)) is OtherCell
    register_cell(EchoConfig, override=True)(EchoCell)


def test_taken_tag_is_refused():
    class Intruder(CellConfig):
        cell_type: str = "lstm"

    with pytest.raises(ValueError, match="taken by LSTMCellConfig"):
        register_cell(Intruder)(EchoCell)


def test_missing_tag_follows_from_the_name():
    class MurmurCellConfig(CellConfig):
        pass

    register_cell(MurmurCellConfig)(EchoCell)
    assert get_cell_config_class("murmur") is MurmurCellConfig


def test_only_cells_are_registered():
    with pytest.raises(TypeError, match="MemoryCell"):
        register_cell(EchoConfig)(dict)


def test_unknown_configurations_and_tags_are_named():
    class SubConfig(LSTMCellConfig):
        pass

    with pytest.raises(ValueError, match="SubConfig"):
        build_cell(SubConfig(hidden_size=4))
    with pytest.raises(ValueError, match="cell_type='lstmm'"):
        get_cell_config_class("lstmm")
