"""What blocks add around a cell."""

import pytest
import torch
from torch.nn import functional as F

from cognexis.cortex_layers.blocks.adapter import AdapterBlock
from cognexis.cortex_layers.blocks.base import BaseBlock
from cognexis.cortex_layers.blocks.passthrough import PassThroughBlock
from cognexis.cortex_layers.blocks.postup import PostUpBlock
from cognexis.cortex_layers.blocks.postup_gated import PostUpGatedBlock
from cognexis.cortex_layers.blocks.preup import PreUpBlock
from cognexis.cortex_layers.blocks.registry import (
    build_block,
    build_block_at_width,
    get_block_class,
    get_block_config_class,
    register_block,
)
from cognexis.cortex_layers.config import (
    AdapterBlockConfig,
    BlockConfig,
    ColumnBlockConfig,
    LSTMCellConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
    PostUpGatedBlockConfig,
    PreUpBlockConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised
from tests.batteries.leaky_cell import LeakyCell, LeakyCellConfig

WIDTH = 6
CONFIGS = {
    "passthrough": PassThroughBlockConfig(cell=LeakyCellConfig()),
    "preup": PreUpBlockConfig(cell=LeakyCellConfig()),
    "postup": PostUpBlockConfig(cell=LeakyCellConfig()),
    "postup_gated": PostUpGatedBlockConfig(cell=LeakyCellConfig()),
    "adapter": AdapterBlockConfig(base_block=PreUpBlockConfig(cell=LeakyCellConfig()), bottleneck=3),
}


def leaky(width=WIDTH):
    return LeakyCell(LeakyCellConfig(hidden_size=width))


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_block_keeps_the_shared_rules(name, holds):
    holds(Unit(randomised(build_block_at_width(CONFIGS[name], WIDTH))))


@pytest.mark.parametrize("name", CONFIGS)
def test_block_is_built_from_its_tag_too(name):
    config = CONFIGS[name]
    again = type(config).model_validate(config.model_dump())
    assert again == config
    assert type(build_block_at_width(again, WIDTH)) is get_block_class(config)
    assert get_block_config_class(config.block_type) is type(config)


@pytest.mark.parametrize(
    ("config", "size"),
    [(CONFIGS["preup"], 12), (CONFIGS["postup"], 6), (PreUpBlockConfig(cell=LeakyCellConfig(), proj_factor=1.3), 7)],
)
def test_cell_gets_its_width_from_the_block_whatever_was_given(config, size):
    given = config.model_copy(update={"cell": LeakyCellConfig(hidden_size=3, decay=0.25)})
    cell = build_block_at_width(given, WIDTH).cell
    assert cell.hidden_size == size and cell.decay == 0.25
    assert given.cell.hidden_size == 3


@pytest.mark.parametrize("block_class", [PassThroughBlock, PreUpBlock, PostUpBlock, PostUpGatedBlock])
def test_cell_of_another_width_is_refused(block_class):
    config = {PassThroughBlock: CONFIGS["passthrough"], PreUpBlock: CONFIGS["preup"]}.get(
        block_class, CONFIGS["postup" if block_class is PostUpBlock else "postup_gated"]
    )
    with pytest.raises(ValueError, match="hidden_size=5"):
        block_class(config=config, d_hidden=WIDTH, cell=leaky(5))


def test_passthrough_adds_the_cell_to_its_input():
    x = torch.randn(2, 4, WIDTH)
    cell = leaky()
    expected, _ = cell(x, None)
    with_residual = PassThroughBlock(PassThroughBlockConfig(), WIDTH, cell)
    without = PassThroughBlock(PassThroughBlockConfig(residual=False), WIDTH, cell)
    torch.testing.assert_close(with_residual(x, None)[0], x + expected)
    torch.testing.assert_close(without(x, None)[0], expected)


def test_preup_computes_its_formula():
    block = randomised(build_block_at_width(CONFIGS["preup"], WIDTH))
    x = torch.randn(2, 4, WIDTH)
    a, z = block.in_proj(F.layer_norm(x, (WIDTH,), block.norm.weight)).chunk(2, -1)
    h, _ = block.cell(F.silu(a), None)
    expected = x + block.out_proj((h + block.learnable_skip * F.silu(a)) * F.silu(z))
    torch.testing.assert_close(block(x, None)[0], expected)
    assert block.norm.bias is None


def test_preup_with_a_zero_projection_is_the_identity():
    block = build_block_at_width(CONFIGS["preup"], WIDTH)
    for parameter in block.out_proj.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 4, WIDTH)
    assert torch.equal(block(x, None)[0], x)


@pytest.mark.parametrize(
    ("cell", "activates"),
    [
        (mLSTMCellConfig(num_heads=2), False),
        (mLSTMCellConfig(num_heads=2, use_axon_qkv=True), True),
        (sLSTMCellConfig(num_heads=2), True),
    ],
)
def test_preup_leaves_the_activation_to_a_plain_mlstm(cell, activates):
    assert build_block_at_width(PreUpBlockConfig(cell=cell), 4).activates_input is activates
    off = PreUpBlockConfig(cell=cell, activate_cell_input=False)
    assert build_block_at_width(off, 4).activates_input is False


@pytest.mark.parametrize("gated", [True, False])
def test_postup_computes_its_formula(gated):
    block = randomised(build_block_at_width(PostUpBlockConfig(cell=LeakyCellConfig(), gated=gated), WIDTH))
    x = torch.randn(2, 4, WIDTH)
    y = x + block.cell(F.layer_norm(x, (WIDTH,), block.norm.weight), None)[0]
    n = F.layer_norm(y, (WIDTH,), block.ffn_norm.weight)
    inner = F.silu(block.gate(n)) * block.up(n) if gated else F.silu(block.up(n))
    torch.testing.assert_close(block(x, None)[0], y + block.out2(inner))


def test_gated_postup_starts_near_the_identity_and_computes_its_formula():
    block = build_block_at_width(CONFIGS["postup_gated"], WIDTH)
    x = torch.randn(2, 4, WIDTH)
    assert (block(x, None)[0] - x).norm() / x.norm() < 0.5
    assert torch.equal(block.gate1.bias, torch.full((WIDTH,), 2.0))
    block = randomised(block)

    def gate(g, x, y):
        r = torch.sigmoid(y @ g.w_r.weight.T + x @ g.u_r.weight.T)
        z = torch.sigmoid(y @ g.w_z.weight.T + x @ g.u_z.weight.T - g.bias)
        return (1 - z) * x + z * torch.tanh(y @ g.w_g.weight.T + (r * x) @ g.u_g.weight.T)

    y = gate(block.gate1, x, block.cell(F.layer_norm(x, (WIDTH,), block.norm1.weight), None)[0])
    inner = F.silu(block.ffn_in(F.layer_norm(y, (WIDTH,), block.norm2.weight)))
    torch.testing.assert_close(block(x, None)[0], gate(block.gate2, y, block.ffn_out(inner)))


def test_gated_postup_is_no_kind_of_postup():
    """Else an override of every post-up block would reach the gated ones."""
    assert not issubclass(PostUpGatedBlockConfig, PostUpBlockConfig)


def test_state_lies_below_the_class_name_of_the_cell():
    block = build_block_at_width(PassThroughBlockConfig(cell=LSTMCellConfig()), WIDTH)
    _, state = block(torch.randn(2, WIDTH), None)
    assert set(state.keys()) == {"LSTMCell"} and set(state["LSTMCell"].keys()) == {"h", "c"}


def test_proj_factor_that_leaves_no_width_is_refused():
    with pytest.raises(ValueError, match="proj_factor=0.1"):
        build_block_at_width(PostUpBlockConfig(cell=LeakyCellConfig(), proj_factor=0.1), 4)


def test_block_without_its_cell_says_so():
    with pytest.raises(ValueError, match="needs a cell"):
        build_block(PassThroughBlockConfig(), 4, None)


# -- adapter --------------------------------------------------------------------------------------------------------


def adapter(base=CONFIGS["preup"], **settings):
    return build_block_at_width(AdapterBlockConfig(base_block=base, bottleneck=8, **settings), WIDTH)


@pytest.mark.parametrize("per_channel", [False, True])
def test_adapter_starts_as_exactly_the_wrapped_block(per_channel):
    block = adapter(per_channel_gate=per_channel)
    x = torch.randn(2, 4, WIDTH)
    assert torch.equal(block(x, None)[0], block.wrapped_block(x, None)[0])
    assert block.gate.shape == ((WIDTH,) if per_channel else ())
    assert block.ln.bias is not None


def test_adapter_learns():
    """With gate and up both zero every gradient of the adapter is zero for ever."""
    block = adapter()
    for parameter in block.wrapped_block.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(4, 5, WIDTH)
    target = block(x, None)[0].detach() + 0.5 * torch.tanh(x)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    before = [parameter.clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = F.mse_loss(block(x, None)[0], target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(parameter, old) for parameter, old in zip(trained, before, strict=True))


def test_adapter_holds_its_base_block_once():
    """Two names of one tensor cannot be saved as safetensors."""
    block = adapter()
    storages = [value.data_ptr() for value in block.state_dict().values()]
    assert len(storages) == len(set(storages))
    assert not any(name.startswith("cell.") for name in block.state_dict())
    assert block.cell is block.wrapped_block.cell
    assert {"wrapped_block", "ln", "down", "up", "gate"} <= {name.split(".")[0] for name in block.state_dict()}


def test_adapter_may_wrap_a_column_and_another_adapter():
    column = ColumnBlockConfig(experts=[CONFIGS["preup"], CONFIGS["postup"]])
    block = adapter(AdapterBlockConfig(base_block=column))
    x = torch.randn(2, 4, WIDTH)
    y, state = block(x, None)
    inner = block.wrapped_block.wrapped_block
    assert torch.equal(y, inner(x, None)[0])
    assert set(state["wrapped", "wrapped"].keys()) == {"expert_PreUpBlock_0", "expert_PostUpBlock_1"}
    assert block.cell is None
    for name in ("steps_equal_one_sequence", "reset_state_makes_rows_fresh", "arguments_stay_as_they_are"):
        next(check for check in PROPERTIES if check.__name__ == name)(Unit(randomised(block)))


def test_adapter_takes_a_cell_for_its_base_block():
    cell = leaky()
    config = AdapterBlockConfig(base_block=PassThroughBlockConfig())
    assert AdapterBlock(config=config, d_hidden=WIDTH, cell=cell).wrapped_block.cell is cell


# -- registry --------------------------------------------------------------------------------------------------------


def test_custom_block_works_and_gets_a_tag():
    class DoublingBlockConfig(BlockConfig):
        pass

    @register_block(DoublingBlockConfig)
    class DoublingBlock(BaseBlock):
        def __init__(self, config, d_hidden, cell):
            super().__init__(d_hidden, cell)

        def forward(self, x, state, *, resets=None):
            y, next_state = self.run_cell(x, state, resets)
            return 2 * y, next_state

    config = DoublingBlockConfig(cell=LeakyCellConfig())
    assert config.block_type == "doubling"
    stored = ColumnBlockConfig(experts=[config]).model_dump()
    block = build_block_at_width(ColumnBlockConfig.model_validate(stored).experts[0], WIDTH)
    x = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(block(x, None)[0], 2 * block.cell(x, None)[0])

    class OtherBlock(DoublingBlock):
        pass

    with pytest.raises(ValueError, match="override=True"):
        register_block(DoublingBlockConfig)(OtherBlock)
    register_block(DoublingBlockConfig, override=True)(OtherBlock)
    assert get_block_class(config) is OtherBlock


def test_derived_configuration_builds_its_base_class_block():
    class NarrowPreUpConfig(PreUpBlockConfig):
        proj_factor: float = 1.0

    assert get_block_class(NarrowPreUpConfig()) is PreUpBlock


def test_unknown_blocks_are_refused():
    class NobodysConfig(BlockConfig):
        block_type: str = "nobodys"

    with pytest.raises(ValueError, match="no block is registered for NobodysConfig"):
        get_block_class(NobodysConfig())
    with pytest.raises(ValueError, match="must be one of"):
        get_block_config_class("nobodys")
    with pytest.raises(TypeError, match="no subclass of BaseBlock"):
        register_block(NobodysConfig)(torch.nn.Linear)
    with pytest.raises(ValueError, match="d_hidden=0"):
        build_block(CONFIGS["passthrough"], 0, leaky())
