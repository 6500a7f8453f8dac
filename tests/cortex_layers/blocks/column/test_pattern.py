"""Patterns of expert tokens."""

import pytest

from cognexis.cortex_layers.blocks.column.auto import build_column_auto_block, build_column_auto_config
from cognexis.cortex_layers.blocks.column.pattern import cut_pattern
from cognexis.cortex_layers.config import (
    AdapterBlockConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
    PostUpGatedBlockConfig,
    PreUpBlockConfig,
    RouterConfig,
    XLCellConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)
from tests.batteries.leaky_cell import LeakyCellConfig

CUSTOM = {
    "Q": PreUpBlockConfig(cell=mLSTMCellConfig(chunk_size=16)),
    "Wide": PassThroughBlockConfig(cell=LeakyCellConfig()),
    "X": PostUpGatedBlockConfig(cell=XLCellConfig(mem_len=32)),
}


@pytest.mark.parametrize(
    ("pattern", "tokens"),
    [
        (None, ["A", "X", "M", "S"]),
        ("", ["A", "X", "M", "S"]),
        ("AXMSLC Ag", ["A", "X", "M", "S", "L", "C", "Ag"]),
        ("AAgA", ["A", "Ag", "A"]),
        ("M^X^S^", ["M^", "X^", "S^"]),
        ("A,X^ , M", ["A", "X^", "M"]),
        (" G ", ["G"]),
        ("Q", ["Q"]),
        ("QQ^", ["Q", "Q^"]),
        ("AWideX^ Q", ["A", "Wide", "X^", "Q"]),
    ],
)
def test_pattern_is_cut_greedily_into_known_tokens(pattern, tokens):
    assert cut_pattern(pattern, CUSTOM) == tokens


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("AZ", "position 1"), ("axms", "position 0"), ("X^^", "position 2"), ("^A", "position 0"), ("A B", "position 2")],
)
def test_unknown_text_is_refused_with_its_position(pattern, words):
    with pytest.raises(ValueError, match=words):
        build_column_auto_config(d_hidden=8, pattern=pattern)


@pytest.mark.parametrize("pattern", [" ", ",", " , "])
def test_blank_pattern_has_no_experts(pattern):
    with pytest.raises(ValueError, match="no experts"):
        build_column_auto_config(d_hidden=8, pattern=pattern)


@pytest.mark.parametrize("pattern", ["A^", "A^ X", "XA^", "Ag^", "L^C"])
def test_caret_without_a_meaning_is_refused_in_every_form(pattern):
    with pytest.raises(ValueError, match="no caret form.*M\\^, S\\^, X\\^"):
        build_column_auto_config(d_hidden=8, pattern=pattern)


def test_tokens_stand_for_their_blocks_and_cells():
    config = build_column_auto_config(d_hidden=8, pattern="A Ag X X^ M M^ S S^ L G C")
    found = [(expert.block_type, expert.cell.cell_type) for expert in config.experts]
    assert found == [
        ("postup", "axon"),
        ("postup_gated", "agalite"),
        ("postup_gated", "xl"),
        ("postup_gated", "xl"),
        ("preup", "mlstm"),
        ("preup", "mlstm"),
        ("postup", "slstm"),
        ("postup", "slstm"),
        ("passthrough", "lstm"),
        ("passthrough", "gru"),
        ("passthrough", "cconv"),
    ]
    cells = [expert.cell for expert in config.experts]
    assert not cells[2].use_axon_qkv and cells[3].use_axon_qkv
    assert not cells[4].use_axon_layer and cells[5].use_axon_layer and cells[5].use_axon_qkv
    assert not cells[6].use_axon_layer and cells[7].use_axon_layer


def test_custom_symbols_work_alone_and_win_over_registered_ones():
    config = build_column_auto_config(d_hidden=8, pattern="QX", custom_map=CUSTOM)
    assert config.experts[0].cell.chunk_size == 16
    assert config.experts[1].cell.mem_len == 32
    assert config.experts[0] is not CUSTOM["Q"] and config.experts[0].cell is not CUSTOM["Q"].cell


def test_caret_on_a_custom_symbol_switches_axon_layers_on():
    wrapped = AdapterBlockConfig(base_block=PostUpBlockConfig(cell=sLSTMCellConfig(num_heads=2)), bottleneck=2)
    config = build_column_auto_config(d_hidden=8, pattern="Q^X^P^", custom_map=CUSTOM | {"P": wrapped})
    assert config.experts[0].cell.use_axon_layer and config.experts[0].cell.use_axon_qkv
    assert config.experts[1].cell.use_axon_qkv and config.experts[1].cell.mem_len == 32
    assert config.experts[2].base_block.cell.use_axon_layer and config.experts[2].base_block.cell.num_heads == 2
    assert not CUSTOM["Q"].cell.use_axon_layer
    with pytest.raises(ValueError, match="no Axon projections"):
        build_column_auto_config(d_hidden=8, pattern="Wide^", custom_map=CUSTOM)


def test_custom_caret_symbol_is_taken_as_it_is():
    custom = {"X^": PassThroughBlockConfig(cell=LeakyCellConfig(decay=0.125))}
    config = build_column_auto_config(d_hidden=8, pattern="XX^", custom_map=custom)
    assert config.experts[0].cell.cell_type == "xl" and config.experts[1].cell.decay == 0.125


def test_axon_layers_everywhere_means_a_caret_where_there_is_one():
    config = build_column_auto_config(d_hidden=8, pattern="AXMSLQ", custom_map=CUSTOM, use_axonlayers=True)
    axon = [
        getattr(each.cell, "use_axon_qkv", False) or getattr(each.cell, "use_axon_layer", False)
        for each in config.experts
    ]
    assert axon == [False, True, True, True, False, True]


def test_every_expert_and_router_is_a_copy():
    router = RouterConfig(d_key=3)
    config = build_column_auto_config(d_hidden=8, pattern="XX", custom_map=CUSTOM, router=router)
    assert config.experts[0].cell is not config.experts[1].cell
    assert config.router == router and config.router is not router


def test_block_is_built_from_a_pattern():
    block = build_column_auto_block(d_hidden=8, pattern="CLW", custom_map={"W": CUSTOM["Wide"]})
    assert block.expert_keys == ["expert_PassThroughBlock_0", "expert_PassThroughBlock_1", "expert_PassThroughBlock_2"]
    with pytest.raises(ValueError, match="d_hidden=0"):
        build_column_auto_config(d_hidden=0)
