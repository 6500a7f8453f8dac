"""Feed-forward layers against their formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cognexis.decoder.feed_forward import build_feed_forward
from tests.batteries.tiny import tiny_config

ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu")


def layer(activation: str, **overrides: Any) -> nn.Module:
    """A float64 layer of width 32 and 48 with random weights, in eval mode."""
    module = build_feed_forward(tiny_config(ffn_activation=activation, **overrides).block_spec("core")).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


FORMULAS = {
    "swiglu": lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "gelu": lambda _, up: gelu(up),
    "relu": lambda _, up: up.clamp(min=0),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_equals_its_formula(activation: str, bias: bool) -> None:
    module, x = layer(activation, mlp_bias=bias), torch.randn(2, 5, 32, dtype=torch.float64)

    def linear(name: str, inputs: Tensor) -> Tensor:
        weights = getattr(module, name)
        return inputs @ weights.weight.T + (weights.bias if bias else 0)

    gate = linear("gate_proj", x) if activation in ("swiglu", "geglu") else None
    expected = linear("down_proj", FORMULAS[activation](gate, linear("up_proj", x)))
    # The same float64 products in another order.
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_gelu_is_the_exact_form_and_not_the_tanh_approximation() -> None:
    module, x = layer("gelu"), torch.randn(4, 32, dtype=torch.float64)
    approximate = module.down_proj(nn.functional.gelu(module.up_proj(x), approximate="tanh"))
    difference = (module(x) - approximate).abs().max()
    assert 1e-6 < difference < 1e-1


def test_the_four_activations_differ_for_equal_weights() -> None:
    x, outputs = torch.randn(3, 32, dtype=torch.float64), []
    source = layer("swiglu").state_dict()
    for activation in ACTIVATIONS:
        module = layer(activation)
        module.load_state_dict({name: source[name] for name in module.state_dict()})
        outputs.append(module(x))
        assert outputs[-1].shape == x.shape
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in outputs[i + 1 :])


def test_gated_and_plain_weights_do_not_load_into_each_other() -> None:
    assert set(layer("swiglu").state_dict()) == set(layer("geglu").state_dict())
    assert set(layer("gelu").state_dict()) == set(layer("relu").state_dict())
    with pytest.raises(RuntimeError, match="gate_proj"):
        layer("gelu").load_state_dict(layer("swiglu").state_dict())
    with pytest.raises(RuntimeError, match="gate_proj"):
        layer("geglu").load_state_dict(layer("relu").state_dict())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_matrix_and_bias_receives_a_gradient(activation: str) -> None:
    module = layer(activation, mlp_bias=True)
    module(torch.randn(2, 5, 32, dtype=torch.float64)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 1e-3, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tokens_do_not_see_each_other(activation: str) -> None:
    module, x = layer(activation), torch.randn(1, 9, 32, dtype=torch.float64)
    order = torch.randperm(9)
    # A matrix kernel may sum a row in another order at another place.
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order], rtol=1e-13, atol=1e-13)
    changed = x.clone()
    changed[:, 4] += 1
    untouched = torch.arange(9) != 4
    assert torch.equal(module(changed)[:, untouched], module(x)[:, untouched])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_down_projection_gives_zero(activation: str) -> None:
    module = layer(activation)
    nn.init.zeros_(module.down_proj.weight)
    assert torch.equal(module(torch.randn(2, 32).double()), torch.zeros(2, 32).double())


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_dropout_acts_on_the_output_in_training_only(activation: str) -> None:
    module, x = layer(activation, ffn_dropout=0.5), torch.randn(50, 32, dtype=torch.float64)
    full = module(x)
    assert torch.equal(module(x), full)
    dropped = module.train()(x)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * full[kept], rtol=1e-14, atol=0)  # kept values are doubled
    assert 0.4 < kept.float().mean() < 0.6, "1,600 draws of 1/2 lie within eight deviations of 0.0125"


def test_attention_dropout_does_not_reach_the_feed_forward() -> None:
    module = layer("swiglu", attention_dropout=0.5).train()
    x = torch.randn(4, 32, dtype=torch.float64)
    assert torch.equal(module(x), module(x))
