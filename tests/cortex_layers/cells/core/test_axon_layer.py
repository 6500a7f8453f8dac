"""The layer that keeps its state in the parent's."""

import pytest
import torch
from tensordict import TensorDict

from cognexis.cortex_layers.cells.core.axon_layer import AxonLayer, update_parent_state
from cognexis.cortex_layers.config import AxonConfig


def layer(**fields):
    return AxonLayer(6, 4, AxonConfig(**fields) if fields else None, name="gate", group="cell")


def test_output_is_the_linear_map_plus_the_recurrence():
    module = layer()
    x, parent = torch.randn(2, 5, 6), TensorDict({}, batch_size=[2])
    y = module(x, parent)
    torch.testing.assert_close(y, module.linear(x) + module.cell(x, None)[0])
    assert module.state_path() == ("cell", "gate")
    torch.testing.assert_close(parent["cell", "gate", "hc1"], module.cell(x, None)[1]["hc1"])


def test_steps_equal_a_sequence_with_resets():
    module = layer(use_srht=True)
    x, resets = torch.randn(2, 6, 6), torch.tensor([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0]])
    whole = module(x, TensorDict({}, batch_size=[2]), resets=resets)
    parent = TensorDict({}, batch_size=[2])
    steps = [module(x[:, t], parent, resets=resets[:, t]) for t in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_shallow_copy_of_the_parent_protects_the_original():
    module = layer()
    parent = module.init_into(TensorDict({}, batch_size=[2]), 2, "cpu", torch.float32)
    before = parent.clone()
    module(torch.randn(2, 6), parent.copy())
    assert (before == parent).all()


def test_fresh_entry_equals_what_a_call_without_one_makes():
    module = layer()
    x = torch.randn(2, 3, 6)
    parent = module.init_into(TensorDict({}, batch_size=[2]), 2, "cpu", torch.float32)
    empty = TensorDict({}, batch_size=[2])
    torch.testing.assert_close(module(x, parent), module(x, empty))
    assert sorted(parent.keys(True, True)) == sorted(empty.keys(True, True))


def test_configuration_of_the_caller_stays_as_it_is():
    cfg = AxonConfig(activation="tanh")
    module = AxonLayer(6, 4, cfg, name="gate")
    assert cfg.hidden_size is None and cfg.out_dim is None and cfg.activation == "tanh"
    assert module.cell.cfg.activation == "identity" and module.cell.out_dim == 4


def test_reset_state_zeroes_rows_in_place():
    module = layer()
    parent = TensorDict({}, batch_size=[2])
    module(torch.randn(2, 3, 6), parent)
    kept = parent["cell", "gate", "hc1"][1].clone()
    assert module.reset_state(torch.tensor([1, 0]), parent) is parent
    assert not parent["cell", "gate", "hc1"][0].any() and torch.equal(parent["cell", "gate", "hc1"][1], kept)
    empty = TensorDict({}, batch_size=[2])
    assert module.reset_state(torch.tensor([1, 0]), empty) is empty
    with pytest.raises(ValueError, match="needs the parent's state"):
        module.reset_state(torch.tensor([1, 0]), None)


def test_state_of_another_batch_size_is_replaced_and_another_dtype_converted(caplog):
    module = layer()
    parent = TensorDict({}, batch_size=[3])
    module(torch.randn(3, 6), parent)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = module.double()(x, parent.copy().double())
    torch.testing.assert_close(module(x, parent), expected)
    assert parent["cell", "gate", "hc1"].dtype == torch.float64
    with caplog.at_level("WARNING"):
        other = TensorDict({"cell": parent["cell"].clone()}, batch_size=[])
        torch.testing.assert_close(module(x[:2], other), module(x[:2], TensorDict({}, batch_size=[2])))
    assert "cell/gate" in caplog.text


def test_what_is_missing_or_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="name=None"):
        AxonLayer(6, 4)
    with pytest.raises(ValueError, match="needs the parent's state"):
        layer()(torch.randn(2, 6))
    with pytest.raises(ValueError, match="expected \\[B, 6\\]"):
        layer()(torch.randn(2, 5), TensorDict({}, batch_size=[2]))


def test_parent_gets_only_what_it_lacks():
    source = TensorDict({"a": torch.ones(2), "b": torch.ones(2)}, batch_size=[2])
    parent = TensorDict({"a": torch.zeros(2)}, batch_size=[2])
    assert update_parent_state(parent, source) is parent
    assert not parent["a"].any() and parent["b"].all()
    assert update_parent_state(parent, None) is parent
