"""Largest singular values against an exact decomposition, and bounding them."""

from types import SimpleNamespace

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.training.callbacks.metrics import MetricBuffer
from cognexis.training.callbacks.spectral import (
    SpectralMonitor,
    core_matrices,
    spectral_norm,
    spectral_normalise,
)
from tests.batteries.tiny import tiny_model


@pytest.mark.parametrize(
    "matrix, sigma",
    [
        ([[3.0, 0.0], [0.0, 4.0]], 4.0),
        ([[1.0, 2.0], [3.0, 4.0]], 5.464986),
        ([[1.0, -1.0], [1.0, -1.0]], 2.0),  # a constant start finds 0
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
        ([[1.0, 2.0], [2.0, 4.0]], 5.0),  # rank one
    ],
)
def test_largest_singular_value_is_the_one_computed_by_hand(matrix, sigma):
    assert spectral_norm(torch.tensor(matrix)) == pytest.approx(sigma, abs=1e-5)


def test_largest_singular_values_of_random_matrices_match_an_exact_decomposition():
    for seed in range(20):
        matrix = torch.randn(7 + seed, 24, generator=torch.Generator().manual_seed(seed))
        assert spectral_norm(matrix, 400) == pytest.approx(torch.linalg.svdvals(matrix)[0].item(), rel=1e-3)


def test_matrix_that_is_not_finite_has_no_value_and_stays():
    matrix = torch.tensor([[float("nan"), 1.0], [1.0, 1.0]])
    before = matrix.clone()
    assert not spectral_norm(matrix) < float("inf")
    spectral_normalise(matrix, 0.5)
    assert torch.equal(matrix.nan_to_num(), before.nan_to_num())


def test_normalisation_brings_the_largest_value_to_the_target_and_leaves_smaller_ones():
    matrix = torch.diag(torch.tensor([3.0, 4.0]))
    spectral_normalise(matrix, 1.0)
    torch.testing.assert_close(matrix, torch.diag(torch.tensor([0.75, 1.0])))
    small = torch.diag(torch.tensor([0.1, 0.2]))
    spectral_normalise(small, 1.0)
    assert torch.equal(small, torch.diag(torch.tensor([0.1, 0.2])))


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_target_that_is_not_positive_is_refused(target):
    with pytest.raises(InvalidConfigError, match="target="):
        spectral_normalise(torch.eye(2), target)
    with pytest.raises(InvalidConfigError, match="target="):
        SpectralMonitor(MetricBuffer(), target=target)


def test_monitor_measures_every_few_steps_alerts_and_bounds():
    model, metrics = tiny_model(), MetricBuffer()
    names = [name for name, _ in core_matrices(model.model.recurrent)]
    assert sorted(name.split(".")[-2] for name in names) == ["down_proj", "o_proj", "proj"]
    monitor = SpectralMonitor(metrics, every=5, target=0.5, limit=0.1)
    monitor.on_step_end(None, SimpleNamespace(global_step=4), None, model=model)
    assert metrics.drain() == {}
    monitor.on_step_end(None, SimpleNamespace(global_step=5), None, model=model)
    found = metrics.drain()
    assert found["alerts/spectral_norm"] == 3.0
    assert all(found[f"spectral/{name.removesuffix('.weight')}"] > 0.5 for name in names)
    for _, weight in core_matrices(model.model.recurrent):
        assert torch.linalg.svdvals(weight.detach().flatten(1))[0] <= 0.501
