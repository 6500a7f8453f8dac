"""Registration of expert tokens."""

import pytest

from cognexis.cortex_layers.blocks.column.auto import build_column_auto_config
from cognexis.cortex_layers.config import PassThroughBlockConfig, PostUpGatedBlockConfig, XLCellConfig
from cognexis.cortex_layers.registry import (
    _TOKENS,
    block_config_for_token,
    can_use_caret,
    get_registered_tokens,
    get_single_char_symbols,
    register_token,
)
from cognexis.cortex_layers.tokens import BUILT_IN_TOKENS, xl_token
from tests.batteries.leaky_cell import LeakyCellConfig


@pytest.fixture(autouse=True)
def _only_for_one_test(monkeypatch):
    for token in set(_TOKENS) - set(BUILT_IN_TOKENS):
        monkeypatch.delitem(_TOKENS, token)
    yield
    for token in set(_TOKENS) - set(BUILT_IN_TOKENS):
        del _TOKENS[token]
    register_token("X", override=True)(xl_token)


def test_built_in_tokens_are_registered():
    assert get_registered_tokens() == BUILT_IN_TOKENS
    assert get_single_char_symbols() == ("A", "X", "M", "S", "L", "G", "C")
    assert [token for token in BUILT_IN_TOKENS if can_use_caret(token)] == ["X", "M", "S"]


def test_registered_token_can_be_used_at_once():
    @register_token("Yy")
    def build():
        return PassThroughBlockConfig(cell=LeakyCellConfig(decay=0.125))

    @register_token("Yy^")
    def build_axon():
        return PassThroughBlockConfig(cell=LeakyCellConfig(decay=0.25))

    assert can_use_caret("Yy")
    config = build_column_auto_config(d_hidden=4, pattern="YyYy^A")
    assert [expert.cell.cell_type for expert in config.experts] == ["leaky", "leaky", "axon"]
    assert [expert.cell.decay for expert in config.experts[:2]] == [0.125, 0.25]
    assert block_config_for_token("Yy") is not block_config_for_token("Yy")


def test_same_builder_may_register_again_and_another_one_needs_override():
    register_token("X")(xl_token)

    def other():
        return PostUpGatedBlockConfig(cell=XLCellConfig(mem_len=1))

    with pytest.raises(ValueError, match="'X' is taken by .*xl_token"):
        register_token("X")(other)
    register_token("X", override=True)(other)
    assert block_config_for_token("X").cell.mem_len == 1


def test_unknown_token_gives_none_and_a_caret_without_meaning_is_refused():
    assert block_config_for_token("Z") is None and block_config_for_token("Z^") is None
    with pytest.raises(ValueError, match="'A' has no caret form; those that have: M\\^, S\\^, X\\^"):
        block_config_for_token("A^")


@pytest.mark.parametrize("symbol", ["", "^", "A B", "a,b", "X^^", "^X"])
def test_symbol_that_no_pattern_could_hold_is_refused(symbol):
    with pytest.raises(ValueError, match="must have no white space"):
        register_token(symbol)
