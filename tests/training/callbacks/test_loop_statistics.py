"""Summaries of states, gates and gradients against values computed by hand."""

import pytest
import torch

from cognexis.training.callbacks.loop_statistics import gate_statistics, loops_observed, state_statistics
from cognexis.training.callbacks.metrics import MetricBuffer
from tests.batteries.tiny import tiny_config, tiny_model

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def test_state_summaries_are_those_computed_by_hand():
    state, previous = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    found = state_statistics(state, previous)
    assert {name: value.item() for name, value in found.items()} == {
        "state_norm": 2.0,
        "max_norm": 2.0,
        "delta_norm": 1.0,
        "cosine": 1.0,
        "nonfinite": 0.0,
    }
    assert state_statistics(state, previous, state)["oscillation"].item() == -1.0  # there and back again


def test_padding_stays_out_and_bad_values_are_counted():
    state = torch.tensor([[[3.0, 4.0], [30.0, 40.0], [0.0, float("inf")]]])
    previous = torch.ones(1, 3, 2)
    found = state_statistics(state, previous, is_real=torch.tensor([[True, False, False]]))
    assert found["state_norm"].item() == found["max_norm"].item() == 5.0
    assert found["nonfinite"].item() == 1.0


def test_gate_summaries_count_what_is_nearly_closed_or_open():
    found = gate_statistics(torch.tensor([[0.01, 0.04, 0.5, 0.96]]))
    assert found["mean"].item() == pytest.approx(0.3775)
    assert (found["share_closed"].item(), found["share_open"].item()) == (0.5, 0.25)


@pytest.mark.parametrize("bias, name", [(9.0, "share_open"), (-9.0, "share_closed")])
def test_forced_gate_shows_in_the_statistics(bias, name):
    model = tiny_model()
    with torch.no_grad():
        model.model.recurrent.gate.proj.bias.fill_(bias)
    metrics = MetricBuffer()
    with loops_observed(model, metrics.add):
        model(input_ids=IDS, num_loops=3, use_cache=False)
    found = metrics.drain()
    assert all(found[f"gate/{name}_{loop}"] > 0.9 for loop in (1, 2, 3))


@pytest.mark.parametrize("every", [None, 2])
def test_every_loop_is_reported_once_and_only_as_scalars(every):
    model = tiny_model(tiny_config()).train()
    if every is not None:
        options = {"use_reentrant": False, "every_k_loops": every}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    reported, seen = [], []
    with loops_observed(model, lambda name, value: reported.append((name, value)), hook=lambda *a: seen.append(a)):
        loss = model(input_ids=IDS, labels=IDS, num_loops=4, use_cache=False).loss
    loss.backward()  # computes the loops again
    assert sorted(name for name, _ in reported if "state_norm" in name) == [
        f"loops/state_norm_{n}" for n in (1, 2, 3, 4)
    ]
    assert all(value.ndim == 0 and not value.requires_grad for _, value in reported)
    assert [loop for loop, _, _ in seen] == [1, 2, 3, 4]
    torch.testing.assert_close(seen[2][2], seen[2][1] - seen[1][1])


def test_observation_changes_neither_result_nor_gradient():
    model = tiny_model().train()
    plain = model(input_ids=IDS, labels=IDS, num_loops=3, use_cache=False).loss
    with loops_observed(model, lambda *_: None):
        observed = model(input_ids=IDS, labels=IDS, num_loops=3, use_cache=False).loss
    assert torch.equal(plain, observed)


def test_buffer_gives_means_and_numbers_and_starts_anew():
    metrics = MetricBuffer()
    metrics.add("a", 1.0)
    metrics.add("a", torch.tensor(3.0, requires_grad=True))
    metrics.count("b", 2)
    assert metrics.drain() == {"a": 2.0, "b": 2.0}
    assert metrics.drain() == {}


def test_alert_is_counted_and_said(caplog):
    metrics = MetricBuffer()
    metrics.alert("gate", "closed")
    assert metrics.drain() == {"alerts/gate": 1.0}
    assert "gate: closed" in caplog.text
