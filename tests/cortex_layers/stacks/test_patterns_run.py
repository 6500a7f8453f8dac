"""Columns and stacks of all built-in cells keep the rules that each cell keeps."""

import pytest
import torch

from cognexis.cortex_layers.blocks.column.auto import build_column_auto_block
from cognexis.cortex_layers.config import AGaLiTeCellConfig, XLCellConfig
from cognexis.cortex_layers.stacks.auto import build_cortex_auto_stack
from tests.batteries.cell_properties import PROPERTIES_OF_MANY, Unit, randomised

# XL and AGaLiTe cut the gradient between calls unless they are told not to.
ATTACHED = [XLCellConfig(detach_memory=False, mem_len=16), AGaLiTeCellConfig(detach_memory=False)]


def all_experts():
    return build_column_auto_block(d_hidden=16, pattern="AXMSLGC Ag")


def axon_stack():
    return build_cortex_auto_stack(d_hidden=16, pattern=["M^", "X^S^", "AgA"], override_global_configs=ATTACHED)


@pytest.mark.parametrize("holds", PROPERTIES_OF_MANY, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(all_experts, id="column of all experts"),
        pytest.param(axon_stack, id="three layers with axon projections", marks=pytest.mark.slow),
    ],
)
def test_built_in_cells_together_keep_the_shared_rules(build, holds):
    # Three random layers on each other in 16 bits: only that nothing breaks is asked for.
    holds(Unit(randomised(build(), 0.1), streamed_gradients=build is axon_stack, coarse=0.5))


@pytest.mark.parametrize("pattern", ["AXMSLGC Ag", "X^M^S^"])
def test_every_parameter_has_a_gradient_within_three_optimizer_steps(pattern):
    """Router, mixer and every gate: whatever starts at zero is reached from something that does not."""
    stack = build_cortex_auto_stack(d_hidden=16, num_layers=1, pattern=pattern)
    x, target = torch.randn(2, 4, 12, 16).unbind(0)
    resets = torch.rand(4, 12) < 0.1
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-3)
    # A bias of all keys moves every score of a query alike, which no softmax sees.
    without = {name for name, _ in stack.named_parameters() if not (".k_proj." in name and name.endswith("bias"))}
    for step in range(4):
        optimizer.zero_grad()
        (stack(x, resets=resets)[0] - target).square().mean().backward()
        without -= {
            name for name, parameter in stack.named_parameters() if parameter.grad is not None and parameter.grad.any()
        }
        if step < 3:
            optimizer.step()
    assert not without
