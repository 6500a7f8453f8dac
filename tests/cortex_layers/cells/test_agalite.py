"""What is special about the AGaLiTe cell; the rules of all cells come from the battery."""

import pytest
import torch

from cognexis.cortex_layers.cells.agalite import AGaLiTeCell
from cognexis.cortex_layers.config import AGaLiTeCellConfig
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised

CASES = {
    "two frequencies": {},
    "four frequencies": {"r": 4, "eta": 3},
    "attached": {"r": 3, "eta": 2, "detach_memory": False},
    "one frequency": {"r": 1, "n_heads": 1},
}


def cell(**fields):
    return randomised(AGaLiTeCell(AGaLiTeCellConfig(**{"hidden_size": 8, "n_heads": 2} | fields)))


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
def test_cell_keeps_the_shared_rules(holds, fields):
    holds(Unit(cell(**fields), streamed_gradients=fields.get("detach_memory") is False))


def test_memory_between_calls_is_detached_unless_asked_otherwise():
    x = torch.randn(2, 4, 8, requires_grad=True)
    _, state = cell()(x, None)
    assert not any(value.requires_grad for value in state.values())
    _, state = cell(detach_memory=False)(x, None)
    assert state["tilde_k"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_gradients_are_finite_and_the_tick_keeps_counting(dtype):
    module = cell().to(dtype)
    x = torch.randn(2, 300, 8).to(dtype).requires_grad_()
    y, state = module(x, None, resets=torch.rand(2, 300) < 0.02)
    y.float().square().sum().backward()
    assert y.dtype == dtype and y.isfinite().all() and x.grad.isfinite().all()
    _, state = module(x, None)
    assert state["tick"].tolist() == [301, 301] and state["s"].dtype == torch.float32


def test_heads_must_make_up_the_width():
    with pytest.raises(ValueError, match="product must be"):
        AGaLiTeCellConfig(hidden_size=10, n_heads=4)
    with pytest.raises(ValueError, match="hidden_size"):
        AGaLiTeCell(AGaLiTeCellConfig())
