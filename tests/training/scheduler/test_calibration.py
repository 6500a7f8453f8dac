"""Calibration figures by the numbers, and maps that help where help is possible."""

import sys

import pytest
import torch

from cognexis.errors import BackendError, InvalidConfigError
from cognexis.looping.value_calibration import build_calibration
from cognexis.training.scheduler.calibration import (
    MAX_KNOTS,
    METHODS,
    auroc,
    expected_calibration_error,
    fit_calibration,
    halt_error_rates,
    mean_absolute_error,
    mean_ranks,
    rank_correlation,
    reliability_curve,
)


def synthetic(count: int = 4000):
    """Gains that depend on a feature, and predictions that know the feature but not the scale."""
    feature = torch.rand(count)
    gains = feature.pow(3) + 0.02 * torch.randn(count)
    return 0.3 + 0.4 * feature, gains


def mapped(settings, values):
    return build_calibration(settings)(values, 1)


def test_errors_of_two_slots_are_those_computed_by_hand():
    predictions, gains = torch.tensor([0.01, 0.2]), torch.tensor([0.2, 0.0])
    assert mean_absolute_error(predictions, gains) == pytest.approx(0.195)
    assert halt_error_rates(predictions, gains, 0.05) == (0.5, 0.5)
    assert halt_error_rates(predictions, gains, 0.3) == (0.0, 0.0)


def test_reliability_bins_have_equal_mass_and_their_distance_is_the_calibration_error():
    predictions = torch.tensor([0.4, 0.1, 0.3, 0.2])
    gains = torch.tensor([0.0, 0.1, 0.5, 0.3])
    curve = reliability_curve(predictions, gains, num_bins=2)
    expected = [
        {"count": 2, "predicted": pytest.approx(0.15), "measured": pytest.approx(0.2)},
        {"count": 2, "predicted": pytest.approx(0.35), "measured": pytest.approx(0.25)},
    ]
    assert curve == expected
    assert expected_calibration_error(curve) == pytest.approx((0.05 + 0.1) / 2)
    assert len(reliability_curve(predictions, gains)) == 4


def test_ranks_share_ties_and_correlate():
    assert mean_ranks(torch.tensor([5.0, 1.0, 5.0, 0.0])).tolist() == [3.5, 2.0, 3.5, 1.0]
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 30.0, 20.0, 40.0])
    assert rank_correlation(a, b) == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.ones(4)) is None


def test_auroc_is_the_share_of_pairs_in_order():
    scores, positive = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, True, False, True])
    assert auroc(scores, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert auroc(scores, torch.ones(4, dtype=torch.bool)) is None


@pytest.mark.parametrize("method", ["linear", "isotonic"])
def test_map_reduces_the_error_on_slots_that_it_has_not_seen(method):
    pytest.importorskip("sklearn")
    values, gains = synthetic()
    seen, unseen = slice(0, 2000), slice(2000, None)
    better = mapped(fit_calibration(method, values[seen], gains[seen]), values[unseen])
    before, after = (mean_absolute_error(p, gains[unseen]) for p in (values[unseen], better))
    assert after < 0.5 * before
    curves = [reliability_curve(p, gains[unseen]) for p in (values[unseen], better)]
    errors = [expected_calibration_error(curve) for curve in curves]
    assert errors[1] < 0.4 * errors[0]
    ranks = rank_correlation(better, values[unseen])
    assert ranks is not None and ranks > 0.99


def test_isotonic_map_finds_the_curve_that_a_line_misses_and_stays_small():
    pytest.importorskip("sklearn")
    values, gains = synthetic()
    errors = {m: mean_absolute_error(mapped(fit_calibration(m, values, gains), values), gains) for m in METHODS}
    assert errors["isotonic"] < 0.5 * errors["linear"] < errors["temperature"]
    settings = fit_calibration("isotonic", values, gains)
    assert len(settings["x"]) == len(settings["y"]) <= MAX_KNOTS


def test_temperature_of_gains_is_the_least_squares_scale():
    values, gains = torch.tensor([1.0, 2.0]), torch.tensor([0.2, 1.0])
    settings = fit_calibration("temperature", values, gains)
    assert settings == {"method": "temperature", "temperature": pytest.approx(5 / 2.2)}


@pytest.mark.parametrize("method", list(METHODS))
def test_logits_become_probabilities_that_come_true(method):
    pytest.importorskip("sklearn")
    logits = 4 * torch.randn(20000)
    answers = torch.bernoulli(torch.sigmoid(logits / 4)).float()
    better = mapped(fit_calibration(method, logits, answers, is_logit=True), logits)
    errors = [expected_calibration_error(reliability_curve(x.sigmoid(), answers)) for x in (logits, better)]
    assert errors[0] > 0.1 and errors[1] < 0.02
    if method != "isotonic":
        size = build_calibration(fit_calibration(method, logits, answers, is_logit=True))(torch.ones(1), 1)
        assert size.item() == pytest.approx(0.25, abs=0.05)


def test_each_loop_can_have_a_map_of_its_own():
    values = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    settings = fit_calibration("temperature", values, values * torch.tensor([0.5, 0.25]), is_by_loop=True)
    assert [entry["temperature"] for entry in settings["maps"]] == pytest.approx([2.0, 4.0])


def test_predictions_that_fall_with_the_gain_and_unknown_methods_are_refused():
    values = torch.linspace(0, 1, 50)
    pytest.importorskip("sklearn")
    for method in ("temperature", "linear"):
        with pytest.raises(InvalidConfigError, match=f"method='{method}': no rising map fits"):
            fit_calibration(method, values, -values)
    with pytest.raises(InvalidConfigError, match=r"method='isotonics': .*did you mean 'isotonic'"):
        fit_calibration("isotonics", values, values)


def test_missing_scikit_learn_is_named(monkeypatch):
    for name in ("sklearn", "sklearn.isotonic", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=r"needs scikit-learn: pip install 'cognexis\[eval\]'"):
        fit_calibration("isotonic", torch.rand(5), torch.rand(5))
    assert fit_calibration("temperature", torch.ones(2), torch.ones(2))["temperature"] == 1.0
