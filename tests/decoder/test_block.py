"""One block: order of its parts, residual scales, the sandwich form, the active mask."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cognexis import CognexisForCausalLM
from cognexis.decoder.block import TransformerBlock
from cognexis.decoder.rope import CognexisRotaryEmbedding
from cognexis.errors import ShapeMismatchError
from tests.batteries.tiny import tiny_config, tiny_model


def block(**overrides: Any) -> TransformerBlock:
    """The core block of a random tiny model, in float64 and eval mode."""
    settings = {"recurrent_norm": "none", "recurrent_residual_mode": "fixed", "recurrent_residual_scale": 0.5}
    return tiny_model(tiny_config(**settings | overrides)).double().model.recurrent.blocks[0]


def rotary(length: int) -> tuple[Tensor, Tensor]:
    return CognexisRotaryEmbedding(tiny_config())(torch.zeros(1, dtype=torch.float64), torch.arange(length)[None])


def causal(length: int) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


def run(module: TransformerBlock, x: Tensor, **kwargs: Any) -> Tensor:
    return module(x, rotary(x.shape[1]), causal(x.shape[1]), **kwargs)


def states(length: int = 5, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, 32, dtype=torch.float64)


@pytest.mark.parametrize("sandwich", [False, True])
def test_parts_run_in_pre_norm_order(sandwich: bool) -> None:
    module = block(recurrent_norm="sandwich" if sandwich else "none")
    parts = ["attention_norm", "attention", "post_attention_norm"]
    parts += ["feed_forward_norm", "feed_forward", "post_feed_forward_norm"]
    order: list[str] = []
    for name in parts:
        part = getattr(module, name)
        if not isinstance(part, nn.Identity):
            part.register_forward_hook(lambda *_, name=name: order.append(name))
    run(module, states())
    assert order == (parts if sandwich else [p for p in parts if not p.startswith("post")])


@pytest.mark.parametrize("mode", ["fixed", "learned_scalar", "learned_vector"])
@pytest.mark.parametrize("sandwich", [False, True])
def test_block_equals_its_equations(mode: str, sandwich: bool) -> None:
    module = block(recurrent_residual_mode=mode, recurrent_norm="sandwich" if sandwich else "none")
    x = states()
    after = module.post_attention_norm, module.post_feed_forward_norm
    assert isinstance(after[0], nn.Identity) != sandwich
    a, b = module.attention_residual_scale, module.feed_forward_residual_scale
    middle = x + a * after[0](module.attention(module.attention_norm(x), rotary(5), causal(5)))
    expected = middle + b * after[1](module.feed_forward(module.feed_forward_norm(middle)))
    assert torch.equal(run(module, x), expected)


@pytest.mark.parametrize("mode", ["fixed", "learned_scalar", "learned_vector"])
def test_zero_scale_is_the_identity(mode: str) -> None:
    module, x = block(recurrent_residual_mode=mode, recurrent_residual_scale=0.0), states()
    for name in ("attention_residual_scale", "feed_forward_residual_scale"):
        if isinstance(getattr(module, name), nn.Parameter):
            nn.init.zeros_(getattr(module, name))
    assert torch.equal(run(module, x), x)


def test_scale_one_adds_the_branches_unscaled() -> None:
    x = states()
    one, half = block(recurrent_residual_scale=1.0), block(recurrent_residual_scale=0.5)
    half.load_state_dict(one.state_dict())
    half.attention_residual_scale = half.feed_forward_residual_scale = 1.0
    assert torch.equal(run(one, x), run(half, x))


def test_scale_of_the_core_follows_its_mode_and_the_other_stages_have_one() -> None:
    model = tiny_model(tiny_config(recurrent_residual_mode="depth_scaled", trained_max_loops=16, max_loops=64))
    assert model.model.recurrent.blocks[0].attention_residual_scale == 0.25
    for stage in (model.model.prelude, model.model.coda):
        scales = [(b.attention_residual_scale, b.feed_forward_residual_scale) for b in stage.blocks]
        assert set(scales) == {(1.0, 1.0)}


@pytest.mark.parametrize("mode, shape", [("learned_scalar", (1,)), ("learned_vector", (32,))])
def test_learned_scale_is_a_parameter_that_starts_at_the_setting_and_learns(mode: str, shape: tuple[int, ...]) -> None:
    config = tiny_config(recurrent_residual_mode=mode, recurrent_residual_scale=0.25)
    model = CognexisForCausalLM(config)
    core = model.model.recurrent.blocks[0]
    for scale in (core.attention_residual_scale, core.feed_forward_residual_scale):
        assert torch.equal(scale.detach(), torch.full(shape, 0.25))
    ids = torch.randint(0, 64, (2, 6))
    model(ids, labels=ids).loss.backward()
    assert core.attention_residual_scale.grad.abs().max() > 0
    assert core.feed_forward_residual_scale.grad.abs().max() > 0


# -- the active mask --------------------------------------------------------------------------------------------------


def test_inactive_rows_keep_their_input_bit_by_bit() -> None:
    module, x = block(), states(length=2, rows=1)
    full = run(module, x)
    out = run(module, x, active_mask=torch.tensor([[True, False]]))
    assert torch.equal(out[:, 0], full[:, 0]) and not torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[:, 1], x[:, 1])


def test_mask_with_everybody_active_changes_nothing() -> None:
    module, x = block(), states()
    assert torch.equal(run(module, x, active_mask=torch.ones(2, 5, dtype=torch.bool)), run(module, x))


def test_inactive_rows_pass_gradients_straight_through() -> None:
    module, x = block(), states(length=3, rows=1).requires_grad_()
    run(module, x, active_mask=torch.tensor([[True, True, False]]))[:, 2].sum().backward()
    expected = torch.zeros_like(x)
    expected[:, 2] = 1
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (2, 1), (5,), (2, 5, 1)])
def test_active_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatchError, match="active_mask"):
        run(block(), states(), active_mask=torch.ones(shape, dtype=torch.bool))


def test_two_interleaved_calls_do_not_affect_each_other() -> None:
    module, first, second = block(), states(4), states(6)
    alone = run(module, first), run(module, second)
    again = [run(module, x) for x in (second, first, second, first)]
    assert torch.equal(again[3], alone[0]) and torch.equal(again[2], alone[1])
