"""Intervals: against scipy and theory, paired, seeded, and refused where they mean nothing."""

import numpy as np
import pytest
import scipy.stats

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.bootstrap import bootstrap_depths, bootstrap_mean, interval_of


def test_interval_holds_the_middle_and_ends_at_values_that_occurred():
    interval = interval_of([*range(1, 101)], 0.9)
    assert (interval.low, interval.high, interval.defined_share) == (5, 95, 1.0)


def test_draws_without_a_value_are_left_out_and_counted():
    interval = interval_of([None, 4, None, 2], 0.95)
    assert (interval.low, interval.high, interval.defined_share) == (2, 4, 0.5)
    interval = interval_of([None], 0.95)
    assert (interval.low, interval.high, interval.defined_share) == (None, None, 0.0)


def test_mean_agrees_with_scipy():
    scores = np.random.default_rng(0).normal(3.0, 2.0, 200)
    ours = bootstrap_mean(scores.tolist(), num_resamples=4000)
    theirs = scipy.stats.bootstrap(
        (scores,), np.mean, n_resamples=4000, method="percentile", random_state=np.random.default_rng(1)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.04) and ours.high == pytest.approx(theirs.high, abs=0.04)


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        interval = bootstrap_mean(generator.normal(0.0, 1.0, 40).tolist(), num_resamples=200, seed=seed)
        covered += interval.low <= 0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seed_decides_the_interval():
    scores = np.random.default_rng(0).random(30).tolist()
    assert bootstrap_mean(scores, seed=4) == bootstrap_mean(scores, seed=4)
    assert bootstrap_mean(scores, seed=4) != bootstrap_mean(scores, seed=5)


def test_depths_share_a_draw():
    """A difference that is the same for every example has an interval of no width, however noisy the examples are."""
    noise = np.random.default_rng(0).normal(0, 10, 50)
    depths = [1] * 50 + [2] * 50
    scores = [*noise, *(noise + 0.5)]
    (interval,) = bootstrap_depths(depths, scores, depths, lambda _, means, __: [means[1] - means[0]])
    assert interval.low == pytest.approx(0.5) and interval.high == pytest.approx(0.5)


def test_single_examples_have_no_interval():
    assert bootstrap_mean([1.0]) is None
    assert bootstrap_mean([]) is None
    assert bootstrap_depths([1, 2], [0.1, 0.2], [1, 2], lambda *_: [1]) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([1.0, 2.0], confidence_level=95), "confidence_level=95: must lie between 0 and 1"),
        (lambda: bootstrap_mean([1.0, 2.0], num_resamples=0), "num_resamples=0"),
        (lambda: bootstrap_depths([1, 1, 2], [1, 2, 3], [1, 2, 3], lambda *_: [1]), "2 at depth 1, 1 at depth 2"),
        (lambda: bootstrap_depths([1, 1], [1], [1, 1], lambda *_: [1]), "2 and 1 entries"),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(InvalidConfigError, match=message):
        call()
