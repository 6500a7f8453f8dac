"""What configurations accept, and how they name what they refuse."""

import pytest
from pydantic import ValidationError

from cognexis.cortex_layers import config as configs
from cognexis.cortex_layers.blocks.column.auto import build_column_auto_config
from cognexis.cortex_layers.cells import CELLS, build_cell
from cognexis.cortex_layers.config import (
    AdapterBlockConfig,
    AGaLiTeCellConfig,
    AxonConfig,
    BlockCellConfig,
    CausalConv1dConfig,
    ColumnBlockConfig,
    CortexStackConfig,
    GRUCellConfig,
    HFLlamaLayerConfig,
    LSTMCellConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
    PostUpGatedBlockConfig,
    PreUpBlockConfig,
    RouterConfig,
    SequentialCellConfig,
    StackCellConfig,
    XLCellConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)
from cognexis.cortex_layers.stacks.auto import build_cortex_auto_stack

BLOCK = PassThroughBlockConfig(cell=LSTMCellConfig())
# What each configuration cannot be made without.
REQUIRED = {
    AdapterBlockConfig: {"base_block": BLOCK},
    ColumnBlockConfig: {"experts": [BLOCK]},
    CortexStackConfig: {"blocks": [], "d_hidden": 4},
    BlockCellConfig: {"block": BLOCK},
    StackCellConfig: {"stack": CortexStackConfig(blocks=[], d_hidden=4)},
    SequentialCellConfig: {"cells": [LSTMCellConfig()]},
}
BUILT_IN = [getattr(configs, name) for name in configs.__all__ if name.endswith("Config")]


@pytest.mark.parametrize("config_class", BUILT_IN)
def test_misspelt_field_is_refused_everywhere(config_class):
    with pytest.raises(ValidationError, match="hiden_size"):
        config_class(**REQUIRED.get(config_class, {}), hiden_size=4)


@pytest.mark.parametrize(
    ("config_class", "field", "values"),
    [
        (LSTMCellConfig, "hidden_size", [0, -4, 2**40, 4.5, "4", True, float("nan")]),
        (CortexStackConfig, "d_hidden", [0, -4, 2**40, 4.5, "4", True, None]),
        (LSTMCellConfig, "num_layers", [0, True]),
        (LSTMCellConfig, "dropout", [-0.1, 1.0, float("nan")]),
        (LSTMCellConfig, "proj_size", [-1]),
        (GRUCellConfig, "num_layers", [0]),
        (GRUCellConfig, "dropout", [1.0]),
        (CausalConv1dConfig, "kernel_size", [-1]),
        (mLSTMCellConfig, "num_heads", [0]),
        (mLSTMCellConfig, "chunk_size", [0]),
        (mLSTMCellConfig, "conv1d_kernel_size", [-1]),
        (sLSTMCellConfig, "num_heads", [0]),
        (sLSTMCellConfig, "conv1d_kernel_size", [-1]),
        (sLSTMCellConfig, "dropout", [-0.1, 1.0]),
        (XLCellConfig, "n_heads", [0]),
        (XLCellConfig, "head_dim", [0]),
        (XLCellConfig, "mem_len", [-1]),
        (XLCellConfig, "attn_dropout", [-0.1, 1.1]),
        (XLCellConfig, "out_dropout", [-0.1, 1.1]),
        (AGaLiTeCellConfig, "eta", [0]),
        (AGaLiTeCellConfig, "r", [0]),
        (AGaLiTeCellConfig, "eps", [0.0, -1.0, float("nan"), float("inf")]),
        (AGaLiTeCellConfig, "dropout", [-0.1, 1.1]),
        (AxonConfig, "r_max", [0.0, 1.5, float("nan")]),
        (AxonConfig, "r_min", [-0.1, 1.0]),
        (AxonConfig, "max_phase", [0.0, -1.0, float("inf")]),
        (AxonConfig, "out_dim", [0, 2**40]),
        (HFLlamaLayerConfig, "mem_len", [-1]),
        (PreUpBlockConfig, "proj_factor", [0.0, -1.0, float("nan"), float("inf")]),
        (PostUpBlockConfig, "proj_factor", [0.0, float("inf")]),
        (PostUpGatedBlockConfig, "gru_bias", [float("nan"), float("inf")]),
        (AdapterBlockConfig, "bottleneck", [0]),
        (AdapterBlockConfig, "dropout", [1.1]),
        (ColumnBlockConfig, "alpha_init", [-1.0, float("nan")]),
        (ColumnBlockConfig, "experts", [[]]),
        (RouterConfig, "temperature", [0.0, -1.0, float("inf"), float("nan")]),
        (RouterConfig, "local_temperature", [0.0]),
        (RouterConfig, "top_k", [0, -1, 1.5, True]),
        (RouterConfig, "d_key", [0]),
        (RouterConfig, "whisper_lambda", [-0.1, float("nan")]),
        (SequentialCellConfig, "cells", [[]]),
    ],
)
def test_impossible_value_is_refused_and_its_field_named(config_class, field, values):
    for value in values:
        with pytest.raises(ValidationError) as caught:
            config_class(**REQUIRED.get(config_class, {}) | {field: value})
        assert [error["loc"][0] for error in caught.value.errors()] == [field], value


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AxonConfig(activation="gelu"), "activation='gelu': must be one of identity, linear, relu"),
        (lambda: AxonConfig(r_min=0.5, r_max=0.5), "r_min=0.5: must be below r_max=0.5"),
        (lambda: AdapterBlockConfig(base_block=BLOCK, activation="tanh"), "activation='tanh': must be one of gelu"),
        (lambda: mLSTMCellConfig(hidden_size=10), "num_heads=4: must divide hidden_size=10"),
        (lambda: sLSTMCellConfig(hidden_size=10), "num_heads=4: must divide hidden_size=10"),
        (lambda: XLCellConfig(hidden_size=10), "n_heads=4: must divide hidden_size=10"),
        (lambda: AGaLiTeCellConfig(hidden_size=12), "n_heads=8, head_dim=None: their product must be hidden_size=12"),
        (lambda: ColumnBlockConfig(experts=[BLOCK], router=RouterConfig(top_k=2)), "top_k=2: there are 1 experts"),
        (lambda: RouterConfig(init_scale_wk=0), "init_scale_wq=0 and init_scale_wk=0"),
        (lambda: PreUpBlockConfig(proj_factor=0.1).get_cell_hidden_size(4), "proj_factor=0.1: .* inner width of 0"),
        (lambda: PreUpBlockConfig(proj_factor=1e300).get_cell_hidden_size(4), "proj_factor=1e.300: .* 1 to 1048576"),
        (lambda: build_column_auto_config(d_hidden=8, pattern="Q"), "unknown token at position 0 .'Q'.; known are A"),
        (lambda: build_column_auto_config(d_hidden=8, pattern="G^"), "'G' has no caret form; those that have"),
        (lambda: build_column_auto_config(d_hidden=8, pattern=" "), "has no experts"),
    ],
)
def test_contradiction_is_refused_and_says_what_is_allowed(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("token", "width", "words"),
    [
        ("M", 7, "num_heads=4: must divide hidden_size=14"),
        ("S", 10, "num_heads=4: must divide hidden_size=10"),
        ("X", 7, "n_heads=4: must divide hidden_size=7"),
        ("Ag", 12, "n_heads=8, head_dim=None: their product must be hidden_size=12"),
    ],
)
def test_width_that_heads_do_not_divide_is_refused_when_a_stack_is_built(token, width, words):
    with pytest.raises(ValueError, match=words):
        build_cortex_auto_stack(d_hidden=width, pattern=token)


def test_hadamard_mixing_that_is_asked_for_wins_over_the_default_matrix():
    asked = AxonConfig(use_srht=True)
    assert not asked.use_untraced_linear and asked.model_dump()["use_untraced_linear"] is False
    assert AxonConfig.model_validate(asked.model_dump()) == asked
    assert AxonConfig().use_untraced_linear
    with pytest.raises(ValidationError, match="use_srht=True and use_untraced_linear=True exclude each other"):
        AxonConfig(use_srht=True, use_untraced_linear=True)


@pytest.mark.parametrize("config_class", CELLS)
def test_cell_without_a_width_says_so(config_class):
    with pytest.raises(ValueError, match="hidden_size"):
        build_cell(config_class(**REQUIRED.get(config_class, {})))
