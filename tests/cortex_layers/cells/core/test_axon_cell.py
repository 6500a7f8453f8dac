"""What is special about the Axon cell; the rules of all cells come from the battery."""

import warnings

import pytest
import torch
from torch import nn

from cognexis.cortex_layers.cells.core import axon_cell
from cognexis.cortex_layers.cells.core.axon_cell import AxonCell
from cognexis.cortex_layers.config import AxonConfig
from cognexis.kernels.rtu import TRACE_NAMES
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised

CASES = {
    "matrix": {"activation": "tanh"},
    "hadamard": {"use_srht": True},
    "bare": {"use_untraced_linear": False, "activation": "silu"},
    "full rank": {"use_fullrank_rtu": True},
}
VARIANTS = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


def cell(**fields):
    return randomised(AxonCell(AxonConfig(hidden_size=6, **fields)))


@VARIANTS
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
def test_cell_keeps_the_shared_rules(holds, fields):
    holds(Unit(cell(**fields)))


def gradients(layers, x, target, resets, cuts, detach=True):
    """Gradients of every parameter of cells in a row, the sequence cut and the states detached between the pieces."""
    states, loss = [None] * len(layers), 0.0
    for low, high in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y = x[:, low:high]
        for i, layer in enumerate(layers):
            y, states[i] = layer(y, states[i], resets=resets[:, low:high])
        states = [state.detach() if detach else state for state in states]
        loss = loss + (y * target[:, low:high]).sum()
    names = [f"{i}.{name}" for i, layer in enumerate(layers) for name, _ in layer.named_parameters()]
    leaves = [parameter for layer in layers for parameter in layer.parameters()]
    return dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


@VARIANTS
@pytest.mark.parametrize("cuts", [[1], [6], [3, 4, 9]], ids=str)
def test_traces_make_cut_gradients_those_of_the_whole_sequence(cuts, fields):
    layers = [cell(**fields).double()]
    x, target = torch.randn(2, 3, 12, 6, dtype=torch.float64).unbind(0)
    resets = torch.rand(3, 12) < 0.15
    whole, cut = (gradients(layers, x, target, resets, pieces) for pieces in ([], cuts))
    for name, expected in whole.items():
        if "input_proj" not in name:
            torch.testing.assert_close(cut[name], expected, rtol=1e-10, atol=1e-11, msg=lambda text, n=name: n + text)
    if "0.input_proj.weight" in whole:  # what made earlier inputs has no traces
        assert not torch.allclose(cut["0.input_proj.weight"], whole["0.input_proj.weight"])


@VARIANTS
def test_attached_state_gives_the_gradients_of_the_whole_sequence_in_two_layers(fields):
    layers = [cell(**fields).double(), cell(**fields).double()]
    x, target = torch.randn(2, 3, 12, 6, dtype=torch.float64).unbind(0)
    resets = torch.rand(3, 12) < 0.15
    whole = gradients(layers, x, target, resets, [])
    for cuts in ([1], [6], [3, 4, 9]):
        for name, found in gradients(layers, x, target, resets, cuts, detach=False).items():
            torch.testing.assert_close(found, whole[name], rtol=1e-10, atol=1e-11, msg=lambda text, n=name: n + text)


def test_state_without_traces_stays_so_and_gives_the_same_numbers():
    module = cell()
    x = torch.randn(2, 9, 6)
    state = module.init_state(2, device="cpu", dtype=torch.float32, traces=False)
    y, after = module(x, state)
    expected, full = module(x, None)
    assert sorted(after.keys()) == ["hc1", "hc2"]
    assert sorted(full.keys()) == sorted(["hc1", "hc2", *TRACE_NAMES])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after["hc1"], full["hc1"])


def test_output_width_follows_the_rule_of_two_maps():
    module = AxonCell(AxonConfig(hidden_size=6, out_dim=4), enforce_out_dim_eq_hidden=False)
    assert module(torch.randn(2, 3, 6), None)[0].shape == (2, 3, 4)
    assert module(torch.randn(2, 0, 6), None)[0].shape == (2, 0, 4)
    assert module.out_proj.weight.shape == (6, 12) and isinstance(module.dim_proj, nn.Linear)
    with pytest.raises(ValueError, match="out_dim=4 differs"):
        AxonCell(AxonConfig(hidden_size=6, out_dim=4))(torch.randn(2, 6), None)


def test_poles_start_in_the_ring_that_was_asked_for():
    module = AxonCell(AxonConfig(hidden_size=500, r_min=0.5, r_max=0.9, max_phase=1.0))
    r = torch.exp(-module.nu_log.exp())
    assert r.min() > 0.49 and r.max() < 0.91
    assert module.theta_log.exp().max() <= 1.001


def test_hadamard_buffers_are_the_same_in_every_cell():
    first, second = (AxonCell(AxonConfig(hidden_size=8, use_srht=True)) for _ in range(2))
    assert torch.equal(first.srht_signs, second.srht_signs) and torch.equal(first.srht_perm, second.srht_perm)
    assert first.input_proj is None and cell().srht_signs.numel() == 0
    kept = AxonCell(AxonConfig(hidden_size=8, use_srht=True, srht_permute=False))
    assert kept.srht_perm.tolist() == list(range(8))


def test_switch_of_the_former_extension_is_named_once(monkeypatch):
    monkeypatch.setattr(axon_cell, "_warned", set())
    with pytest.warns(DeprecationWarning, match="cuda_seq_threshold has no effect"):
        AxonCell(AxonConfig(hidden_size=4, cuda_seq_threshold=7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AxonCell(AxonConfig(hidden_size=4, cuda_seq_threshold=7))


def test_width_must_be_given():
    with pytest.raises(ValueError, match="hidden_size"):
        AxonCell(AxonConfig())
