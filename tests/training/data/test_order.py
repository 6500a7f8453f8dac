"""The order of rows: a permutation per epoch, equal from any stop point, for any world size."""

import itertools
import json

import numpy as np
import pytest

from cognexis.errors import InvalidConfigError
from cognexis.training.data.order import RowOrder
from cognexis.training.data.permutation import KeyedPermutation


@pytest.mark.parametrize("size", [0, 1, 2, 3, 31, 32, 33, 1000, 4096, 70_001])
def test_permutation_takes_every_element_once(size):
    elements = KeyedPermutation(size, 7, "x")(np.arange(size))
    assert np.array_equal(np.sort(elements), np.arange(size))


def test_permutation_of_part_of_the_positions_is_part_of_the_permutation():
    permutation = KeyedPermutation(10_007, 1)
    positions = np.array([9, 10_006, 0, 5000, 9])
    assert np.array_equal(permutation(positions), permutation(np.arange(10_007))[positions])


def test_permutations_are_spread_evenly():
    size, keys = 10, 1000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), KeyedPermutation(size, key)(np.arange(size))] += 1
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert chi_square < 137  # the 99.9 % point for (10 - 1)^2 degrees of freedom is 127; fixed keys, so no chance


def test_all_permutations_of_four_elements_occur():
    seen = {tuple(KeyedPermutation(4, key)(np.arange(4)).tolist()) for key in range(300)}
    assert seen == set(itertools.permutations(range(4)))


def test_neighbours_do_not_stay_neighbours():
    steps = np.diff(RowOrder(100_000, seed=5).rows(0, 100_000))
    assert (np.abs(steps) <= 10).mean() < 1e-3  # 2e-4 is expected


def test_order_does_not_change_between_releases():
    assert RowOrder(20, seed=3).rows(0, 20).tolist() == [
        *RowOrder(20, seed=3).rows(0, 7).tolist(),
        *RowOrder(20, seed=3).rows(7, 20).tolist(),
    ]
    assert RowOrder(8, seed=1234).rows(0, 16).tolist() == [5, 2, 7, 6, 3, 0, 4, 1, 4, 3, 5, 6, 0, 1, 7, 2]


def test_epochs_and_seeds_differ_and_repeat():
    order = RowOrder(1000, seed=1)
    first, second = order.rows(0, 1000), order.rows(1000, 2000)
    assert not np.array_equal(first, second) and not np.array_equal(first, RowOrder(1000, seed=2).rows(0, 1000))
    assert np.array_equal(first, RowOrder(1000, seed=1).rows(0, 1000))
    assert np.array_equal(np.sort(second), np.arange(1000))


def test_without_shuffle_rows_come_as_they_stand():
    order = RowOrder([3, 2], shuffle=False)
    assert order.rows(0, 10).tolist() == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("window", [1, 7, 64, 999, 1000, 5000])
def test_window_keeps_rows_near_and_loses_none(window):
    order = RowOrder(1000, seed=2, window=window)
    for epoch in range(2):
        rows = order.rows(1000 * epoch, 1000 * (epoch + 1))
        assert np.array_equal(np.sort(rows), np.arange(1000))
    if 1 < window < 1000:
        for start in range(0, 1000 // window * window, window):
            places = order._shuffled(0, np.arange(start, start + window))
            assert places.max() - places.min() == window - 1


def test_weights_give_each_part_its_share_in_whole_passes():
    order = RowOrder([10, 8, 6], [1.0, 0.25, 2.0], seed=4)
    assert order.places == (10, 2, 12) and order.rows_per_epoch == 24
    rows = order.rows(0, 24 * 4)
    for low, high in ((0, 10), (10, 18), (18, 24)):
        part = rows[(rows >= low) & (rows < high)]
        for start in range(0, len(part) - (high - low) + 1, high - low):
            assert np.unique(part[start : start + high - low]).size <= high - low
        assert np.unique(part).size == high - low
    for epoch in range(4):
        counts = np.bincount(rows[24 * epoch : 24 * (epoch + 1)], minlength=24)
        assert (counts[:10] == 1).all() and counts[10:18].sum() == 2 and (counts[18:] == 2).all()
    assert np.bincount(rows, minlength=24)[10:18].tolist() == [1] * 8  # 4 epochs of 2 make one pass


def consumed(order: RowOrder, world: int, batch: int, start: int, steps: int) -> np.ndarray:
    """Rows in the order in which all ranks together use them, each rank asking for its own positions."""
    pieces = []
    for step in range(steps):
        first = start + step * world * batch
        pieces += [order.rows(first + rank * batch, first + (rank + 1) * batch) for rank in range(world)]
    return np.concatenate(pieces)


def check_stop_points(num_rows: int, num_shards: int, num_stops: int) -> None:
    counts = np.diff(np.linspace(0, num_rows, num_shards + 1).astype(int)).tolist()
    order = RowOrder(counts, seed=11)
    whole = order.rows(0, num_rows)
    assert np.array_equal(np.sort(whole), np.arange(num_rows))
    generator = np.random.default_rng(0)
    for stop in generator.integers(0, num_rows, num_stops):
        for world in (1, 2, 4, 8):
            batch = 64 // world
            position = int(stop) // 64 * 64
            resumed = RowOrder(counts, seed=11)
            rows = consumed(resumed, world, batch, position, 3)
            expected = np.concatenate((whole, order.rows(num_rows, num_rows + 192)))[position : position + 192]
            assert np.array_equal(rows, expected), (stop, world)


def test_any_stop_point_continues_the_same_order_for_any_world_size():
    check_stop_points(10_000, 7, 10)


@pytest.mark.slow
def test_two_hundred_stop_points_of_a_million_rows():
    check_stop_points(1_000_000, 64, 200)


def test_fingerprint_tells_orders_apart():
    base = RowOrder([5, 6], seed=1)
    others = [RowOrder([6, 5], seed=1), RowOrder([5, 6], [1, 2], seed=1), RowOrder([5, 6], seed=2)]
    others += [RowOrder([5, 6], seed=1, window=4), RowOrder([5, 6], seed=1, shuffle=False)]
    assert len({order.fingerprint() for order in [base, *others]}) == 6
    assert base.fingerprint() == RowOrder([5, 6], seed=1).fingerprint()
    assert json.dumps(base.fingerprint())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": []}, "counts=.*at least one"),
        ({"counts": [3, 0]}, r"counts\[1\]=0"),
        ({"counts": [3, True]}, r"counts\[1\]=True"),
        ({"counts": [3], "weights": [1, 2]}, "weights=.*as many"),
        ({"counts": [3], "weights": [0]}, r"weights\[0\]=0.0: must be finite, above 0"),
        ({"counts": [3], "weights": [float("nan")]}, r"weights\[0\]=nan"),
        ({"counts": 3, "seed": -1}, "seed=-1"),
        ({"counts": 3, "window": 0}, "window=0"),
        ({"counts": 2**49}, "2\\^48"),
    ],
)
def test_bad_orders_are_refused(arguments, message):
    with pytest.raises(InvalidConfigError, match=message):
        RowOrder(**arguments)


def test_negative_positions_are_refused():
    with pytest.raises(InvalidConfigError, match="positions -1 to 3"):
        RowOrder(5).rows(-1, 3)
