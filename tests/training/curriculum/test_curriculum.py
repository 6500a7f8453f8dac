"""The curriculum of a run: samples, books, states."""

import json
from dataclasses import replace

import pytest

from cognexis.errors import InvalidConfigError
from cognexis.training.curriculum import CurriculumSettings, LoopCurriculum, LoopSample
from cognexis.training.curriculum.settings import DISTRIBUTIONS

RULE = CurriculumSettings(target_max_loops=12, warmup_steps=100, ramp_steps=500, high_depth_fraction=0.1, window=64)


def run(curriculum, steps):
    drawn = []
    for step in steps:
        sample = curriculum.sample(step)
        curriculum.record(step, sample.sampled_loops)
        drawn.append(sample.sampled_loops)
    return drawn


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_resumed_curriculum_draws_what_the_uninterrupted_one_draws(name):
    rule = replace(RULE, sampling_distribution=name, mean=3.0)
    whole = LoopCurriculum(rule, seed=5)
    expected = run(whole, range(1000))
    first = LoopCurriculum(rule, seed=5)
    drawn = run(first, range(437))
    resumed = LoopCurriculum(rule, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    drawn += run(resumed, range(437, 1000))
    assert drawn == expected
    assert resumed.state_dict() == whole.state_dict()


def test_draws_do_not_depend_on_the_order_of_asking():
    curriculum = LoopCurriculum(RULE, seed=9)
    forward = [curriculum.sample(step).sampled_loops for step in range(300)]
    backward = [curriculum.sample(step).sampled_loops for step in reversed(range(300))]
    assert forward == backward[::-1]
    assert forward != [LoopCurriculum(RULE, seed=10).sample(step).sampled_loops for step in range(300)]


def test_sample_covers_a_draw_beyond_the_current_maximum():
    curriculum = LoopCurriculum(replace(RULE, high_depth_fraction=1.0))
    for step in range(200):
        sample = curriculum.sample(step)
        assert curriculum.current_max(step) < sample.sampled_loops <= sample.max_loops <= 12


@pytest.mark.parametrize("bounds", [(0, 2, 1), (2, 4, 1), (1, 4, 5)])
def test_sample_outside_its_bounds_is_refused(bounds):
    with pytest.raises(InvalidConfigError, match="sampled_loops=.: must lie between"):
        LoopSample(*bounds)


def test_books_count_every_step_and_the_current_window():
    curriculum = LoopCurriculum(replace(RULE, sampling_distribution="stratified", high_depth_fraction=0.0), seed=1)
    drawn = run(curriculum, range(70))
    assert sum(curriculum.histogram.values()) == curriculum.draws == 70
    assert dict(curriculum.histogram) == {n: drawn.count(n) for n in set(drawn)}
    assert sum(curriculum.window_counts.values()) == 6  # steps 64 to 69


def test_nonfinite_depth_lowers_the_maximum_for_good():
    curriculum = LoopCurriculum(replace(RULE, warmup_steps=0, ramp_steps=0, sampling_distribution="fixed"))
    assert curriculum.sample(0).sampled_loops == 12
    assert curriculum.lower_below(9) and curriculum.sample(1).sampled_loops == 8
    assert not curriculum.lower_below(12)
    resumed = LoopCurriculum(curriculum.settings)
    resumed.load_state_dict(curriculum.state_dict())
    assert resumed.sample(2).sampled_loops == 8
    curriculum.lower_below(1)
    assert curriculum.sample(3).sampled_loops == 1  # never below the minimum


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schema_version": 2}, "schema_version=2: must be 1"),
        ({"draws": -1}, "draws=-1: must be a count"),
        ({"draws": 3}, "draws=3: the histogram holds 10 draws"),
        ({"last_step": 1.5}, "last_step=1.5: must be an optimizer step"),
        ({"ceiling": 13}, "ceiling=13: must lie between 1 and 12"),
        ({"histogram": {"40": 10}}, r"histogram=\[40\]: loop counts must lie between 1 and 12"),
        ({"histogram": {"x": 10}}, "must map loop counts to numbers of steps"),
        ({"seed": 4}, "other settings: seed: saved 4, now 0"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(changes, message):
    curriculum = LoopCurriculum(RULE)
    run(curriculum, range(10))
    before = curriculum.state_dict()
    with pytest.raises(InvalidConfigError, match=message):
        curriculum.load_state_dict(before | changes)
    assert curriculum.state_dict() == before


def test_state_of_other_settings_can_be_forced():
    old = LoopCurriculum(RULE, seed=3)
    run(old, range(10))
    new = LoopCurriculum(replace(RULE, ramp="cosine"), seed=3)
    assert new.differences(old.state_dict()) == {"ramp": ("linear", "cosine")}
    with pytest.raises(InvalidConfigError, match="ramp: saved 'linear', now 'cosine'"):
        new.load_state_dict(old.state_dict())
    new.load_state_dict(old.state_dict(), allow_other_settings=True)
    assert new.draws == 10


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True])
def test_seed_outside_its_range_is_refused(seed):
    with pytest.raises(InvalidConfigError, match="seed="):
        LoopCurriculum(RULE, seed=seed)


@pytest.mark.parametrize("step", [-1, 1.0])
def test_step_that_is_no_count_is_refused(step):
    with pytest.raises(InvalidConfigError, match="step="):
        LoopCurriculum(RULE).sample(step)
