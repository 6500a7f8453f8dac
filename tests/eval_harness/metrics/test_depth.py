"""The four depth metrics: values computed by hand, and every input that has no value."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.depth import (
    DEFINITIONS,
    Undefined,
    depth_efficiency_index,
    depth_gain_ratio,
    loop_saturation_point,
    overthinking_threshold,
)

DEPTHS, SCORES, COMPUTE = [1, 2, 4, 8], [0.50, 0.70, 0.72, 0.69], [10, 20, 40, 80]
LOWER = {"direction": "lower_is_better"}


def values(pairs):
    return [pair.value for pair in pairs]


def test_efficiency_is_gain_per_compute_between_neighbours():
    pairs = depth_efficiency_index(DEPTHS, SCORES, COMPUTE)
    assert values(pairs) == pytest.approx([0.02, 0.001, -0.00075], rel=1e-12)
    assert [(pair.shallow, pair.deep) for pair in pairs] == [(1, 2), (2, 4), (4, 8)]


def test_efficiency_of_losses_has_the_other_sign():
    assert values(depth_efficiency_index([1, 2], [3.0, 2.5], [10, 20], **LOWER)) == [0.05]
    assert values(depth_efficiency_index([1, 2], [3.0, 2.5], [10, 20])) == [-0.05]


def test_baseline_form_compares_with_the_shallowest():
    pairs = depth_efficiency_index(DEPTHS, SCORES, COMPUTE, form="baseline")
    assert values(pairs) == pytest.approx([0.2 / 10, 0.22 / 30, 0.19 / 70], rel=1e-12)
    assert {pair.shallow for pair in pairs} == {1}


def test_saturation_point_in_its_three_definitions():
    def point(definition, **settings):
        return loop_saturation_point(DEPTHS, SCORES, COMPUTE, definition=definition, **settings).depth

    assert point("threshold", threshold=0.005) == 2
    assert point("threshold") == 4
    assert point("max_dei") == 2
    assert point("baseline_argmax") == 2


def test_definitions_differ_where_a_late_loop_pays_most():
    late = ([1, 2, 4], [0.1, 0.11, 0.9], [10, 20, 30])
    assert loop_saturation_point(*late, definition="max_dei").depth == 4
    assert loop_saturation_point(*late, definition="threshold", threshold=0.005).depth == 1
    slow = ([1, 2, 4], [0.1, 0.5, 0.9], [10, 20, 25])
    assert loop_saturation_point(*slow, definition="baseline_argmax").depth == 4


def test_overthinking_is_the_depth_before_the_harm():
    found = overthinking_threshold(DEPTHS, SCORES, tolerance=0.01)
    assert (found.depth, found.first_harmful_depth) == (4, 8)
    found = overthinking_threshold(DEPTHS, SCORES, tolerance=0.05)
    assert (found.depth, found.first_harmful_depth, found.undefined) == (None, None, Undefined.NOT_REACHED)


def test_a_drop_of_exactly_the_tolerance_does_not_harm():
    assert 0.72 - 0.71 > 0.01  # by rounding
    assert overthinking_threshold([1, 2], [0.72, 0.71], tolerance=0.01).depth is None
    assert overthinking_threshold([1, 2], [0.72, 0.7099], tolerance=0.01).depth == 1
    assert overthinking_threshold([1, 2], [2.0, 2.01], tolerance=0.01, **LOWER).depth is None


def test_study_of_three_depths():
    points = ([1, 2, 4], [0.5, 0.7, 0.69], [10, 20, 40])
    assert values(depth_efficiency_index(*points)) == pytest.approx([0.02, -0.0005], rel=1e-12)
    assert loop_saturation_point(*points, definition="threshold", threshold=0.005).depth == 2
    found = overthinking_threshold(*points[:2], tolerance=0.001)
    assert (found.depth, found.first_harmful_depth) == (2, 4)


def test_gain_ratio_of_deepest_and_of_chosen_depths():
    assert depth_gain_ratio(DEPTHS, SCORES).value == pytest.approx(0.38)
    assert depth_gain_ratio(DEPTHS, SCORES, shallow=1, deep=4).value == pytest.approx(0.44)
    assert depth_gain_ratio([1, 4], [3.0, 2.6], **LOWER).value == pytest.approx(0.4 / 3)


def test_negative_scores_gain_relative_to_their_size():
    assert depth_gain_ratio([1, 2], [-4.0, -2.0]).value == 0.5


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1:8])
def test_order_of_the_points_does_not_matter(order):
    depths, scores, compute = ([column[i] for i in order] for column in (DEPTHS, SCORES, COMPUTE))
    assert depth_efficiency_index(depths, scores, compute) == depth_efficiency_index(DEPTHS, SCORES, COMPUTE)
    assert overthinking_threshold(depths, scores) == overthinking_threshold(DEPTHS, SCORES)
    assert depth_gain_ratio(depths, scores) == depth_gain_ratio(DEPTHS, SCORES)


def test_repeated_depths_count_with_their_mean():
    pairs = depth_efficiency_index([1, 2, 1, 2], [0.4, 0.6, 0.6, 0.8], [10, 20, 10, 20])
    assert values(pairs) == pytest.approx([0.02])


def test_equal_efficiencies_choose_the_shallower_depth():
    tied = ([1, 2, 3], [0.1, 0.2, 0.3], [10, 20, 30])
    assert values(depth_efficiency_index(*tied))[1] != values(depth_efficiency_index(*tied))[0]  # by rounding
    for definition in ("max_dei", "baseline_argmax"):
        assert loop_saturation_point(*tied, definition=definition).depth == 2


def test_equal_scores_neither_help_nor_harm():
    flat = ([1, 2, 4], [0.5, 0.5, 0.5], [10, 20, 40])
    assert values(depth_efficiency_index(*flat)) == [0, 0]
    assert loop_saturation_point(*flat).undefined is Undefined.NO_DEPTH_HELPS
    assert overthinking_threshold(*flat[:2]).undefined is Undefined.NOT_REACHED
    assert depth_gain_ratio(*flat[:2]).value == 0


@pytest.mark.parametrize("compute", [[10, 10], [20, 10]])
def test_no_efficiency_without_more_compute(compute):
    (pair,) = depth_efficiency_index([1, 2], [0.1, 0.2], compute)
    assert (pair.value, pair.undefined) == (None, Undefined.COMPUTE_DOES_NOT_INCREASE)
    for definition in DEFINITIONS:
        found = loop_saturation_point([1, 2], [0.1, 0.2], compute, definition=definition)
        assert (found.depth, found.undefined) == (None, Undefined.COMPUTE_DOES_NOT_INCREASE)


@pytest.mark.parametrize("depths", [[], [3], [3, 3]])
def test_one_depth_has_no_depth_metrics(depths):
    scores = compute = [1.0] * len(depths)
    assert depth_efficiency_index(depths, scores, compute) == []
    assert depth_efficiency_index(depths, scores, compute, form="baseline") == []
    assert loop_saturation_point(depths, scores, compute).undefined is Undefined.FEWER_THAN_TWO_DEPTHS
    assert overthinking_threshold(depths, scores).undefined is Undefined.FEWER_THAN_TWO_DEPTHS
    assert depth_gain_ratio(depths, scores).undefined is Undefined.FEWER_THAN_TWO_DEPTHS


def test_gain_ratio_of_a_zero_baseline_is_undefined():
    found = depth_gain_ratio([1, 2], [0.0, 0.5])
    assert (found.value, found.undefined) == (None, Undefined.ZERO_BASELINE)


def test_quotients_beyond_floats_are_undefined_not_infinite():
    (pair,) = depth_efficiency_index([1, 2], [0.0, 1e300], [0.0, 1e-300])
    assert (pair.value, pair.undefined) == (None, Undefined.OUT_OF_RANGE)
    assert depth_gain_ratio([1, 2], [1e-300, 1e300]).undefined is Undefined.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: depth_efficiency_index([1, 2], [0.1], [1, 2]), "2, 1 and 2 entries"),
        (lambda: depth_efficiency_index([0, 2], [0.1, 0.2], [1, 2]), "depths: 0 must be an integer of 1 or more"),
        (lambda: depth_efficiency_index([1.5, 2], [0.1, 0.2], [1, 2]), "depths: 1.5 must be an integer"),
        (lambda: depth_efficiency_index([True, 2], [0.1, 0.2], [1, 2]), "depths: True"),
        (lambda: depth_efficiency_index([1, 2], [math.nan, 0.2], [1, 2]), "scores: nan at depth 1"),
        (lambda: depth_efficiency_index([1, 2], [0.1, 0.2], [1, math.inf]), "compute at depth 2=inf"),
        (lambda: depth_efficiency_index([1, 2], [0.1, 0.2], [-1, 2]), "compute at depth 1=-1"),
        (lambda: depth_efficiency_index([1, 2], [0.1, 0.2], [1, 2], form="x"), "pairwise, baseline"),
        (lambda: overthinking_threshold([1], [0.1], direction="up"), "higher_is_better, lower_is_better"),
        (lambda: overthinking_threshold([1, 2], [0.1, 0.2], tolerance=-1.0), "tolerance=-1.0"),
        (lambda: loop_saturation_point([1], [1.0], [1], definition="dei"), "max_dei, threshold, baseline_argmax"),
        (lambda: loop_saturation_point([1], [1.0], [1], threshold=math.nan), "threshold=nan"),
        (lambda: depth_gain_ratio([1, 2], [0.1, 0.2], deep=4), "deep=4: must be one of the depths 1, 2"),
        (lambda: depth_gain_ratio([1, 2], [0.1, 0.2], shallow=2), "deep=2: must be deeper than shallow=2"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InvalidConfigError, match=message):
        call()


curves = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8)


@given(curves)
def test_losses_are_scores_with_the_sign_turned(scores):
    depths = list(range(1, len(scores) + 1))
    turned = [-score for score in scores]
    assert depth_efficiency_index(depths, scores, depths) == depth_efficiency_index(depths, turned, depths, **LOWER)
    assert overthinking_threshold(depths, scores) == overthinking_threshold(depths, turned, **LOWER)
    assert loop_saturation_point(depths, scores, depths) == loop_saturation_point(depths, turned, depths, **LOWER)


@given(curves, st.floats(0, 1e3))
def test_up_to_the_overthinking_threshold_no_step_harms(scores, tolerance):
    depths = list(range(1, len(scores) + 1))
    found = overthinking_threshold(depths, scores, tolerance=tolerance)
    last = len(scores) if found.depth is None else found.depth
    steps = [scores[d] - scores[d - 1] for d in range(1, last)]
    assert all(step >= -tolerance - 1e-8 for step in steps)
    if found.depth is not None:
        assert scores[found.depth] < scores[found.depth - 1] - tolerance
