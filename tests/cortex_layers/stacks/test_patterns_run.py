"""Columns and stacks of all built-in cells keep the rules that each cell keeps."""

import pytest

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
