import pytest
import torch
from torch import nn

from cognexis.cortex_layers.cells.mlstm import MultiHeadLayerNorm, bias_linspace_init_, mLSTMCell
from cognexis.cortex_layers.config import AxonConfig, mLSTMCellConfig
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised

CELLS = {
    "plain": {"chunk_size": 4},
    "without_convolution": {"chunk_size": 64, "conv1d_kernel_size": 0},
    "axon_gates_and_qkv": {"chunk_size": 5, "use_axon_layer": True, "use_axon_qkv": True},
}


def build(**fields):
    return mLSTMCell(mLSTMCellConfig(hidden_size=8, num_heads=2, **fields))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
def test_cell_keeps_the_shared_rules(holds, kind):
    # Small noise: a denominator near zero turns the rounding of 16 bits into any number.
    holds(Unit(randomised(build(**CELLS[kind]), scale=0.1), coarse=0.15))


@pytest.mark.parametrize("axon", [False, True])
def test_gates_start_independent_of_the_input(axon):
    cell = build(use_axon_layer=axon)
    igate, fgate = (gate.linear if axon else gate for gate in (cell.igate, cell.fgate))
    assert not igate.weight.any() and not fgate.weight.any()
    torch.testing.assert_close(fgate.bias, torch.tensor([3.0, 6.0]))
    assert 0 < igate.bias.abs().max() < 0.6


def test_state_has_the_documented_shapes():
    state = build(use_axon_layer=True, use_axon_qkv=True).init_state(3, device="cpu", dtype=torch.bfloat16)
    shapes = {key: tuple(state[key].shape) for key in ("c", "n", "m", "conv")}
    assert shapes == {"c": (3, 2, 4, 4), "n": (3, 2, 4, 1), "m": (3, 2, 1, 1), "conv": (3, 4, 8)}
    assert {state[key].dtype for key in ("c", "n", "m")} == {torch.float32} and state["conv"].dtype == torch.bfloat16
    assert set(state["mlstm"].keys()) == {"igate", "fgate"} and set(state["mlstm_qkv"].keys()) == {"qk", "v"}
    assert "conv" not in build(conv1d_kernel_size=0).init_state(3, device="cpu", dtype=torch.float32)


def test_state_without_traces_stays_so_and_gives_the_same_numbers():
    cell = randomised(build(use_axon_layer=True, use_axon_qkv=True), 0.1)
    x, resets = torch.randn(2, 9, 8), torch.rand(2, 9) < 0.2
    start = cell.init_state(2, device="cpu", dtype=torch.float32, traces=False)
    groups = [("mlstm", "igate"), ("mlstm", "fgate"), ("mlstm_qkv", "qk"), ("mlstm_qkv", "v")]
    y, after = cell(x, start, resets=resets)
    expected, full = cell(x, None, resets=resets)
    for state in (start, after, cell.reset_state(after, torch.ones(2)), cell(x[:, 0], after)[1]):
        assert all(sorted(state[group].keys()) == ["hc1", "hc2"] for group in groups)
    assert all(len(full[group].keys()) == 10 for group in groups)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after["mlstm", "igate", "hc1"], full["mlstm", "igate", "hc1"])


def test_axon_configuration_reaches_its_layers():
    cell = build(use_axon_qkv=True, axon_qkv_config=AxonConfig(use_fullrank_rtu=True))
    assert cell.qk.cell.cfg.use_fullrank_rtu and cell.v.cell.cfg.use_fullrank_rtu


def test_norm_equals_a_group_norm():
    norm = MultiHeadLayerNorm(6, 3, bias=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    h = torch.randn(4, 3, 2)
    expected = nn.functional.group_norm(h.flatten(1), 3, norm.weight, norm.bias)
    torch.testing.assert_close(norm(h), expected)


def test_bias_takes_equal_steps():
    torch.testing.assert_close(bias_linspace_init_(torch.zeros(4), 3.0, 6.0), torch.tensor([3.0, 4.0, 5.0, 6.0]))


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="hidden_size"):
        mLSTMCell(mLSTMCellConfig())
    with pytest.raises(ValueError, match="num_heads=3"):
        mLSTMCell(mLSTMCellConfig(num_heads=3).model_copy(update={"hidden_size": 8}))
