"""What holds for every built-in cell beside the shared rules, and what their states look like."""

import pickle

import pytest
import torch

from cognexis.cortex_layers.cells import build_cell
from cognexis.cortex_layers.config import (
    AGaLiTeCellConfig,
    AxonConfig,
    CausalConv1dConfig,
    GRUCellConfig,
    LSTMCellConfig,
    XLCellConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)
from tests.batteries.cell_properties import assert_near, assert_same_state, leaves, randomised, tree

H = 8
# With what a cell needs to start from a given state; without one of them the state is a fresh one.
CONFIGS = {
    "agalite": (AGaLiTeCellConfig(n_heads=2), ["tilde_k", "tilde_v", "s", "tick"]),
    "axon": (AxonConfig(), ["hc1", "hc2"]),
    "conv": (CausalConv1dConfig(), ["conv"]),
    "gru": (GRUCellConfig(), ["h"]),
    "lstm": (LSTMCellConfig(), ["h", "c"]),
    "mlstm": (mLSTMCellConfig(num_heads=2), ["c", "n", "m", "conv"]),
    "mlstm^": (mLSTMCellConfig(num_heads=2, use_axon_layer=True, use_axon_qkv=True), ["c", "n", "m", "conv"]),
    "slstm": (sLSTMCellConfig(num_heads=2), ["y", "c", "n", "m", "conv"]),
    "slstm^": (sLSTMCellConfig(num_heads=2, use_axon_layer=True), ["y", "c", "n", "m", "conv"]),
    "xl": (XLCellConfig(n_heads=2, mem_len=5), ["mem", "mem_seg"]),
    "xl^": (XLCellConfig(n_heads=2, mem_len=5, use_axon_qkv=True), ["mem", "mem_seg", "mem_k", "mem_v"]),
}
CELLS = pytest.mark.parametrize("name", CONFIGS)


def cell(name):
    config, _ = CONFIGS[name]
    return randomised(build_cell(config.model_copy(update={"hidden_size": H})), 0.1)


@CELLS
def test_sums_over_time_are_float32_in_sixteen_bits(name):
    """What only stands there for the next tokens (inputs, outputs, keys, values) has the dtype that was asked for."""
    state = cell(name).init_state(2, device="cpu", dtype=torch.bfloat16)
    for key, value in leaves(state).items():
        last = key if isinstance(key, str) else key[-1]
        if value.is_floating_point():
            is_held = last in ("conv", "h", "y", "mem", "mem_k", "mem_v")
            assert value.dtype == (torch.bfloat16 if is_held else torch.float32), key


@CELLS
def test_state_that_lacks_a_key_is_fresh(name):
    module = cell(name)
    x = torch.randn(2, 6, H)
    _, used = module(x.flip(1), None)
    expected, last = module(x, None)
    for key in CONFIGS[name][1]:
        if name in ("mlstm^", "slstm^", "xl^"):
            continue  # their groups are looked up one by one
        y, after = module(x, used.exclude(key))
        assert torch.equal(y, expected), key
        assert_same_state(after, last, 0)


@CELLS
def test_state_of_another_batch_size_is_refused(name):
    module = cell(name)
    _, state = module(torch.randn(3, 4, H), None)
    x = torch.randn(2, 4, H)
    if name.startswith("xl"):  # whose memory is dropped
        assert_near(module(x, state)[0], module(x, None)[0], "output", 1e-6)
        return
    with pytest.raises(ValueError, match=r"of shape \[.*3.*expected \[.*2"):
        module(x, state)


@CELLS
def test_shapes_are_known_without_memory(name):
    module = cell(name).to("meta")
    y, state = module(torch.empty(2, 5, H, device="meta"), None)
    assert y.shape == (2, 5, H) and y.is_meta
    assert tree(state) == tree(cell(name).init_state(2, device="cpu", dtype=torch.float32))
    for shape in ((2, 5), (2,)):
        resets = torch.empty(shape, dtype=torch.bool, device="meta")
        y, _ = module(torch.empty(*shape, H, device="meta"), state, resets=resets)
        assert y.shape == (*shape, H)


@CELLS
def test_inference_mode_and_pickles_change_nothing(name):
    module = cell(name)
    x, resets = torch.randn(2, 6, H), torch.rand(2, 6) < 0.3
    expected, last = module(x, None, resets=resets)
    with torch.inference_mode():
        y, state = module(x, None, resets=resets)
        module(x[:, 0], state)
    assert_near(y, expected, "output", 1e-6)
    twin = pickle.loads(pickle.dumps(module))
    again, other = twin(x, None, resets=resets)
    assert torch.equal(again, expected)
    assert_same_state(other, last, 0)


@CELLS
def test_one_row_and_none_are_rows_too(name):
    module = cell(name)
    x = torch.randn(3, 5, H)
    assert_near(module(x[:1], None)[0], module(x, None)[0][:1], "output", 1e-5)
    y, state = module(x[:0], None)
    assert y.shape == (0, 5, H) and state.batch_size == torch.Size([0])
