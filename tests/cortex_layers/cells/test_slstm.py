import pytest
import torch
from torch import nn

from cognexis.cortex_layers.cells.slstm import sLSTMCell
from cognexis.cortex_layers.config import sLSTMCellConfig
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised

CELLS = {"plain": {}, "without_convolution": {"conv1d_kernel_size": 0}, "axon_gates": {"use_axon_layer": True}}


def build(**fields):
    return sLSTMCell(sLSTMCellConfig(hidden_size=8, num_heads=2, **fields))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
def test_cell_keeps_the_shared_rules(holds, kind):
    holds(Unit(randomised(build(**CELLS[kind]))))


def test_parameters_start_as_documented():
    cell = sLSTMCell(sLSTMCellConfig(hidden_size=128, num_heads=2))
    assert cell.recurrent_kernel.shape == (2, 256, 64) and not cell.recurrent_kernel.any()
    assert cell.bias.shape == (2, 4, 64) and not cell.bias[:, [0, 2, 3]].any()
    torch.testing.assert_close(cell.bias[1, 1], torch.linspace(3, 6, 64))
    for gate in cell.gates.values():
        assert abs(gate.weight.std().item() / (2 / (5 * 64)) ** 0.5 - 1) < 0.1


def test_cell_follows_its_equations():
    cell = randomised(build(conv1d_kernel_size=0)).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    got, state = cell(x, None)
    y = c = n = m = torch.zeros(8, dtype=torch.float64)
    for t in range(6):
        gates = []
        for g, name in enumerate("ifzo"):
            matrix = torch.block_diag(*cell.gates[name].weight.transpose(1, 2))
            recurrent = torch.block_diag(*cell.recurrent_kernel[:, 4 * g : 4 * g + 4])
            gates.append(matrix @ x[0, t] + recurrent @ y + cell.bias[:, g].flatten())
        i, f, z, o = gates
        forgotten = m + nn.functional.logsigmoid(f)
        m = i if t == 0 else torch.maximum(forgotten, i)
        write, keep = (i - m).exp(), (forgotten - m).exp().clamp(max=1)
        c, n = keep * c + write * z.tanh(), keep * n + write
        y = o.sigmoid() * c / (n + 1e-6)
        expected = nn.functional.group_norm(y[None], 2, cell.norm.weight)
        torch.testing.assert_close(got[:, t], expected)
    torch.testing.assert_close(state["y"][0], y)
    torch.testing.assert_close(state["m"][0], m)


def test_state_has_the_documented_shapes():
    state = build(use_axon_layer=True).init_state(3, device="cpu", dtype=torch.bfloat16)
    assert all(state[key].shape == (3, 8) for key in "ycnm") and state["conv"].shape == (3, 4, 8)
    assert {state[key].dtype for key in "cnm"} == {torch.float32} and state["y"].dtype == torch.bfloat16
    assert set(state["slstm"].keys()) == {"if_fused", "zo_fused"}
    assert "conv" not in build(conv1d_kernel_size=0).init_state(3, device="cpu", dtype=torch.float32)


def test_state_without_traces_stays_so_and_gives_the_same_numbers():
    cell = randomised(build(use_axon_layer=True))
    x, resets = torch.randn(2, 9, 8), torch.rand(2, 9) < 0.2
    start = cell.init_state(2, device="cpu", dtype=torch.float32, traces=False)
    y, after = cell(x, start, resets=resets)
    expected, full = cell(x, None, resets=resets)
    for state in (start, after, cell.reset_state(after, torch.ones(2)), cell(x[:, 0], after)[1]):
        assert all(sorted(state["slstm", name].keys()) == ["hc1", "hc2"] for name in ("if_fused", "zo_fused"))
    assert all(len(full["slstm", name].keys()) == 10 for name in ("if_fused", "zo_fused"))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after["slstm", "if_fused", "hc1"], full["slstm", "if_fused", "hc1"])


def test_dropout_leaves_the_state_alone():
    cell = build(dropout=0.5).train()
    x = torch.randn(2, 5, 8)
    (one, first), (other, second) = cell(x, None), cell(x, None)
    assert not torch.equal(one, other)
    assert all(torch.equal(first[key], second[key]) for key in "ycnm")


def test_missing_hidden_size_is_named():
    with pytest.raises(ValueError, match="hidden_size"):
        sLSTMCell(sLSTMCellConfig())
