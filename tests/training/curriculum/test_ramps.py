"""The maximum of a step, against values computed by hand."""

import pytest

from cognexis.training.curriculum.ramps import maximum_at, ramp_progress
from cognexis.training.curriculum.settings import CurriculumSettings

STEPS = (0, 99, 100, 200, 350, 600, 850, 1000, 1099, 1100, 5000)
GOLDEN = {
    "linear": [2, 2, 2, 3, 4, 7, 9, 11, 11, 12, 12],
    "cosine": [2, 2, 2, 2, 3, 7, 10, 11, 11, 12, 12],
    "exponential": [2, 2, 2, 2, 2, 3, 5, 8, 11, 12, 12],
}


def settings(**changes):
    return CurriculumSettings(**{"target_max_loops": 12, "warmup_steps": 100, "ramp_steps": 1000, **changes})


@pytest.mark.parametrize("ramp", GOLDEN)
def test_maximum_grows_as_computed_by_hand(ramp):
    assert [maximum_at(settings(ramp=ramp), step) for step in STEPS] == GOLDEN[ramp]


@pytest.mark.parametrize("ramp", GOLDEN)
def test_maximum_never_falls_and_reaches_every_count(ramp):
    maxima = [maximum_at(settings(ramp=ramp), step) for step in range(1200)]
    assert maxima == sorted(maxima)
    assert set(maxima) == set(range(2, 13))


def test_linear_ramp_has_no_rounding_delay():
    rule = CurriculumSettings(target_max_loops=101, initial_max_loops=1, ramp_steps=100)
    assert [maximum_at(rule, step) for step in range(101)] == list(range(1, 102))


def test_ramp_of_no_steps_reaches_the_target_after_the_warm_up():
    rule = settings(ramp_steps=0)
    assert [maximum_at(rule, step) for step in (0, 99, 100)] == [2, 2, 12]
    assert [ramp_progress(rule, step) for step in (99, 100)] == [0.0, 1.0]


def test_milestones_hold_until_the_next_one():
    rule = settings(ramp="milestone", warmup_steps=5, milestones={10: 3, 20: 8})
    assert [maximum_at(rule, step) for step in (0, 9, 10, 19, 20, 10_000)] == [2, 2, 3, 3, 8, 8]


def test_fixed_mode_is_at_the_target_from_the_start():
    assert maximum_at(settings(mode="fixed"), 0) == 12
    assert ramp_progress(settings(mode="fixed"), 0) == 1.0
