"""What torch.compile makes of cells and stacks: the same numbers.

Graphs are traced, forward and backward, and run as they are: code for them would take minutes to make.
"""

import pytest
import torch

from cognexis.cortex_layers.cells import build_cell
from cognexis.cortex_layers.config import (
    AGaLiTeCellConfig,
    AxonConfig,
    CausalConv1dConfig,
    CellConfig,
    ColumnBlockConfig,
    CortexStackConfig,
    GRUCellConfig,
    LSTMCellConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
    PreUpBlockConfig,
    XLCellConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)
from cognexis.cortex_layers.factory import build_cortex
from tests.batteries.cell_properties import assert_same_state, randomised

H = 8
RESETS = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
CELLS: dict[str, CellConfig] = {
    "agalite": AGaLiTeCellConfig(n_heads=2, eta=2),
    "axon": AxonConfig(),
    "axon full rank": AxonConfig(use_fullrank_rtu=True),
    "conv": CausalConv1dConfig(),
    "conv mixing": CausalConv1dConfig(channel_mixing=True),
    "gru": GRUCellConfig(),
    "lstm": LSTMCellConfig(),
    "mlstm": mLSTMCellConfig(num_heads=2, chunk_size=3),
    "slstm": sLSTMCellConfig(num_heads=2),
    "xl": XLCellConfig(n_heads=2, mem_len=5),
    "xl^": XLCellConfig(n_heads=2, mem_len=5, use_axon_qkv=True),
}
STACK = CortexStackConfig(
    d_hidden=H,
    blocks=[
        PreUpBlockConfig(cell=mLSTMCellConfig(num_heads=2, chunk_size=3), proj_factor=1.0),
        ColumnBlockConfig(
            experts=[PassThroughBlockConfig(cell=LSTMCellConfig()), PostUpBlockConfig(cell=CausalConv1dConfig())]
        ),
        PostUpBlockConfig(cell=AxonConfig()),
    ],
)


def outcome(module, call, resets):
    """Output, state and gradients of two calls in a row."""
    module.zero_grad()
    x = torch.randn(2, 4, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
    first, state = call(x, None, resets=resets)
    second, state = call(x, state, resets=resets)
    (first.sum() + (second * torch.arange(float(H))).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"first": first, "second": second, "gradient of x": x.grad} | gradients, state


def assert_compiles(module):
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager")
    for resets in (None, RESETS):
        expected, last = outcome(module, module, resets)
        found, state = outcome(module, compiled, resets)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Operations may be joined differently, which moves the last bits of float32.
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text)
        assert_same_state(state.detach(), last.detach(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_compiled_cell_computes_the_same(name):
    assert_compiles(randomised(build_cell(CELLS[name].model_copy(update={"hidden_size": H})), 0.1))


@pytest.mark.slow
def test_compiled_stack_of_three_layers_computes_the_same():
    assert_compiles(randomised(build_cortex(STACK), 0.1))
