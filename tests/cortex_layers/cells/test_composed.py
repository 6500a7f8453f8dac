"""Cells made of blocks, stacks and other cells."""

import json

import pytest
import torch

from cognexis.cortex_layers.blocks.registry import build_block_at_width
from cognexis.cortex_layers.cells.composed import BlockCell, SequentialCell, StackCell
from cognexis.cortex_layers.cells.registry import build_cell
from cognexis.cortex_layers.config import (
    BlockCellConfig,
    CausalConv1dConfig,
    CortexStackConfig,
    LSTMCellConfig,
    PassThroughBlockConfig,
    PreUpBlockConfig,
    SequentialCellConfig,
    StackCellConfig,
)
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised
from tests.batteries.leaky_cell import LeakyCellConfig

BLOCK = PreUpBlockConfig(cell=LeakyCellConfig(), proj_factor=1.5)
SIMPLE = PassThroughBlockConfig(cell=LeakyCellConfig(decay=0.75))
CONFIGS = {
    "block": BlockCellConfig(hidden_size=6, block=BLOCK),
    "stack": StackCellConfig(hidden_size=6, stack=CortexStackConfig(d_hidden=99, blocks=[SIMPLE, BLOCK])),
    "sequential": SequentialCellConfig(
        hidden_size=6, cells=[CausalConv1dConfig(kernel_size=2), LSTMCellConfig(), LeakyCellConfig()]
    ),
}


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_cell_keeps_the_shared_rules(name, holds):
    holds(Unit(randomised(build_cell(CONFIGS[name]))))


def test_cells_compute_what_is_inside():
    x = torch.randn(2, 5, 6)
    block = build_cell(CONFIGS["block"])
    assert isinstance(block, BlockCell) and torch.equal(block(x, None)[0], block.parts[0](x, None)[0])
    stack = build_cell(CONFIGS["stack"])
    assert isinstance(stack, StackCell) and stack.parts[0].d_hidden == 6
    assert torch.equal(stack(x, None)[0], stack.parts[0](x)[0])
    chain = build_cell(CONFIGS["sequential"])
    assert isinstance(chain, SequentialCell)
    y = x
    for part in chain.parts:
        y, _ = part(y, None)
    assert torch.equal(chain(x, None)[0], y)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("block", ["PreUpBlock"]),
        ("stack", ["CortexStack"]),
        ("sequential", ["CausalConv1d_0", "LSTMCell_1", "LeakyCell_2"]),
    ],
)
def test_state_lies_below_the_names_of_the_parts(name, keys):
    assert list(build_cell(CONFIGS[name])(torch.randn(2, 6), None)[1].keys()) == keys


@pytest.mark.parametrize("name", CONFIGS)
def test_cell_takes_its_width_from_the_block_and_survives_json(name):
    outer = PreUpBlockConfig(cell=CONFIGS[name].model_copy(update={"hidden_size": None}))
    again = PreUpBlockConfig.model_validate(json.loads(outer.model_dump_json()))
    assert again == outer
    block = build_block_at_width(again, 4)
    assert block.cell.hidden_size == 8
    assert block(torch.randn(2, 3, 4), None)[0].shape == (2, 3, 4)


def test_cells_nest_without_end():
    config = BlockCellConfig(block=PassThroughBlockConfig(cell=LeakyCellConfig()))
    for _ in range(3):
        stack = CortexStackConfig(d_hidden=1, blocks=[PassThroughBlockConfig(cell=config)])
        config = SequentialCellConfig(cells=[StackCellConfig(stack=stack), config])
    cell = build_cell(config.model_copy(update={"hidden_size": 3}))
    y, state = cell(torch.randn(2, 4, 3), None)
    assert y.shape == (2, 4, 3)
    again, _ = cell(torch.randn(2, 3), state)
    assert again.shape == (2, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_missing_width_is_refused_by_name(name):
    with pytest.raises(ValueError, match="hidden_size must be set"):
        build_cell(CONFIGS[name].model_copy(update={"hidden_size": None}))
