"""What is special about the XL cell; the rules of all cells come from the battery."""

import pytest
import torch

from cognexis.cortex_layers.cells.xl import XLCell
from cognexis.cortex_layers.config import XLCellConfig
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised

CASES = {
    "plain": {},
    "short memory": {"mem_len": 3},
    "attached": {"mem_len": 5, "detach_memory": False},
    "axon": {"mem_len": 5, "use_axon_qkv": True, "detach_memory": False},
    "own head width": {"head_dim": 3, "use_bias": False, "mem_len": 4},
}


def cell(**fields):
    return randomised(XLCell(XLCellConfig(**{"hidden_size": 8, "n_heads": 2, "mem_len": 32} | fields)))


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
def test_cell_keeps_the_shared_rules(holds, fields):
    holds(Unit(cell(**fields), streamed_gradients=fields.get("detach_memory") is False))


def test_first_token_attends_to_itself_only():
    module = cell().double()
    x = torch.randn(2, 8, dtype=torch.float64)
    expected = module.o_proj(module.v_proj(x))
    torch.testing.assert_close(module(x, None)[0], expected)


def test_no_token_sees_further_back_than_the_memory():
    module = cell(mem_len=3).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    y, _ = module(x, None)
    reached = torch.autograd.grad(y[:, 7].sum(), x)[0].abs().sum((0, 2)) > 0
    assert reached.tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_without_memory_attention_is_causal_inside_the_call():
    module = cell(mem_len=0).double()
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    y, state = module(x, None)
    assert state["mem"].shape == (2, 0, 8)
    torch.testing.assert_close(module(x[:, :25], None)[0], y[:, :25])
    reached = torch.autograd.functional.jacobian(lambda x: module(x[None], None)[0][0, -1].sum(), x[0])
    assert (reached.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("is_axon", [False, True])
def test_state_has_fixed_length_and_detached_memory(is_axon):
    module = cell(mem_len=6, use_axon_qkv=is_axon).train()
    x = torch.randn(2, 4, 8, requires_grad=True)
    _, state = module(x, None)
    assert state["mem"].shape == (2, 6, 8) and state["mem_seg"].shape == (2, 6)
    assert state["mem_seg"].tolist() == [[-1, -1, 0, 0, 0, 0]] * 2
    torch.testing.assert_close(state["mem"][:, 2:], x.detach())
    memories = ["mem", "mem_k", "mem_v"] if is_axon else ["mem"]
    assert not any(state[key].requires_grad for key in memories)


def test_state_without_traces_stays_so_and_gives_the_same_numbers():
    module = cell(mem_len=4, use_axon_qkv=True)
    x = torch.randn(2, 6, 8)
    start = module.init_state(2, device="cpu", dtype=torch.float32, traces=False)
    y, after = module(x, start)
    for state in (start, after, module.reset_state(after, torch.ones(2))):
        assert all(sorted(state["xl_qkv", name].keys()) == ["hc1", "hc2"] for name in "qkv")
    torch.testing.assert_close(y, module(x, None)[0])


def test_longer_memory_is_cut_and_another_batch_size_starts_fresh():
    module = cell(mem_len=4).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    _, long = XLCell(XLCellConfig(hidden_size=8, n_heads=2, mem_len=8)).double()(x[:, :8], None)
    expected = module(x, None)[0][:, 8:]
    torch.testing.assert_close(module(x[:, 8:], long)[0], expected)
    torch.testing.assert_close(module(x[:1], long)[0], module(x[:1], None)[0])


def test_dropout_of_attention_weights_acts_in_training_only():
    module = cell(attn_dropout=0.5)
    x = torch.randn(2, 9, 8)
    assert torch.equal(module(x, None)[0], module(x, None)[0])
    module.train()
    assert not torch.equal(module(x, None)[0], module(x, None)[0])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_heads=3: must divide"):
        XLCellConfig(hidden_size=8, n_heads=3)
    with pytest.raises(ValueError, match="hidden_size"):
        XLCell(XLCellConfig())
