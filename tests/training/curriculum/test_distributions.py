"""Probabilities by hand, and draws against them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from cognexis.training.curriculum.distributions import PMFS, PROFILE_PMFS
from cognexis.training.curriculum.sampling import draw_loops
from cognexis.training.curriculum.settings import DISTRIBUTIONS, CurriculumSettings

RULE = CurriculumSettings(target_max_loops=8, min_loops=2, ramp_steps=0)


def draws(settings, count, seed=1, tag=None, ceiling=None):
    most = settings.target_max_loops if ceiling is None else ceiling
    return np.array([draw_loops(settings, seed, step, most, tag) for step in range(count)])


@pytest.mark.parametrize("name", [*DISTRIBUTIONS])
@pytest.mark.parametrize("low, high", [(1, 1), (1, 8), (3, 4), (2, 40)])
def test_probabilities_are_a_distribution_over_the_range(name, low, high):
    pmf = PMFS[name](low, high, CurriculumSettings(target_max_loops=64))
    assert len(pmf) == high - low + 1 and (pmf >= 0).all()
    assert pmf.sum() == pytest.approx(1, abs=1e-12)


def test_geometric_probabilities_halve_and_the_rest_lies_on_the_top():
    assert PMFS["geometric"](1, 8, RULE).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 128]


def test_truncated_normal_probabilities_are_those_of_a_rounded_normal():
    rule = replace(RULE, mean=4.0, std=1.5)
    counts = np.arange(2, 9)
    expected = stats.norm.cdf(counts + 0.5, 4, 1.5) - stats.norm.cdf(counts - 0.5, 4, 1.5)
    np.testing.assert_allclose(PMFS["truncated_normal"](2, 8, rule), expected / expected.sum(), rtol=1e-9)
    assert PMFS["truncated_normal"](2, 8, replace(RULE, mean=500.0)).tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_lognormal_poisson_probabilities_match_a_direct_simulation():
    rule = replace(RULE, mean=4.0, sigma=0.5, cap=7)
    generator = np.random.default_rng(0)
    rates = np.exp(generator.normal(np.log(2.0) - 0.125, 0.5, 400_000))
    counted = np.bincount(np.minimum(7, 2 + generator.poisson(rates)), minlength=9)[2:] / 400_000
    np.testing.assert_allclose(PMFS["lognormal_poisson"](2, 8, rule), counted, atol=0.004)  # five standard errors


@pytest.mark.parametrize("name", sorted(set(DISTRIBUTIONS) - {"stratified", "fixed"}))
def test_draws_follow_the_probabilities(name):
    rule = replace(RULE, sampling_distribution=name)
    drawn = draws(rule, 6000)
    assert drawn.min() >= 2 and drawn.max() <= 8
    pmf = PMFS[name](2, 8, rule)
    counted = np.bincount(drawn, minlength=9)[2:]
    assert stats.chisquare(counted[pmf > 0], 6000 * pmf[pmf > 0] / pmf.sum()).pvalue > 1e-3


def test_fixed_draws_the_maximum_and_fixed_mode_the_target():
    assert set(draws(replace(RULE, sampling_distribution="fixed", warmup_steps=50), 50)) == {2}
    assert set(draws(replace(RULE, mode="fixed", warmup_steps=50, high_depth_fraction=1.0), 50)) == {8}


def test_stratified_meets_each_count_its_share_of_times_in_every_window():
    rule = replace(RULE, sampling_distribution="stratified", window=70)
    drawn = draws(rule, 700)
    orders = [drawn[start : start + 70].tolist() for start in range(0, 700, 70)]
    assert all(Counter(order) == dict.fromkeys(range(2, 9), 10) for order in orders)
    assert len({tuple(order) for order in orders}) == 10


def test_stratified_gives_its_remaining_entries_to_all_counts_in_turn():
    rule = replace(RULE, sampling_distribution="stratified", window=10)  # 7 counts, 3 entries remain
    drawn = draws(rule, 70)
    assert Counter(drawn.tolist()) == dict.fromkeys(range(2, 9), 10)
    assert all(set(Counter(drawn[i : i + 10].tolist()).values()) == {1, 2} for i in range(0, 70, 10))


def test_high_depth_draws_lie_above_the_current_maximum_and_are_uniform():
    rule = replace(RULE, warmup_steps=10**6, high_depth_fraction=1.0, initial_max_loops=4)
    drawn = draws(rule, 3000)
    assert set(drawn.tolist()) == {5, 6, 7, 8}
    assert stats.chisquare(np.bincount(drawn)[5:]).pvalue > 1e-3
    some = draws(replace(rule, high_depth_fraction=0.05), 6000)
    assert abs((some > 4).mean() - 0.05) < 0.015  # five standard errors


def test_high_depth_draws_end_when_the_target_is_reached():
    assert set(draws(replace(RULE, high_depth_fraction=1.0, sampling_distribution="fixed"), 50)) == {8}


def test_ceiling_bounds_every_draw():
    rule = replace(RULE, warmup_steps=10**6, high_depth_fraction=0.5, initial_max_loops=4)
    assert draws(rule, 2000, ceiling=6).max() == 6
    assert draws(rule, 2000, ceiling=3).max() == 3


def test_tags_choose_shallow_medium_and_deep_draws():
    rule = replace(RULE, task_profiles={"classification": "shallow", "math": "deep", "summarisation": "medium"})
    means = {tag: draws(rule, 1500, tag=tag).mean() for tag in ("classification", "summarisation", "math")}
    assert means["classification"] < 3.2 and abs(means["summarisation"] - 5) < 0.15 and means["math"] > 6.8
    for tag, profile in (("classification", "shallow"), ("math", "deep"), ("summarisation", "medium")):
        counted = np.bincount(draws(rule, 3000, tag=tag), minlength=9)[2:]
        assert stats.chisquare(counted, 3000 * PROFILE_PMFS[profile](2, 8)).pvalue > 1e-3
    assert draws(rule, 100, tag="other").tolist() == draws(rule, 100).tolist()
