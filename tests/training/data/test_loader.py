"""The loader: nothing lost, nothing repeated, the same order, from any stop point and with any world size."""

import itertools
import json
import threading
import time

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset

from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.training.data.loader import TrainingLoader
from cognexis.training.data.order import RowOrder
from cognexis.training.data.partition import rank_indices
from cognexis.training.data.prefetch import prefetch
from cognexis.training.data.sampler import RowSampler


class Numbers(Dataset[int]):
    """Row i is i; ``slow`` rows take a moment, and ``broken`` ones cannot be read."""

    def __init__(self, size: int, broken: int = -1) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if index == self.broken:
            raise InvalidConfigError(f"row {index}: cannot be read")
        return index


def make(size=100, batch_size=4, seed=3, order=None, **settings):
    order = order or RowOrder(size, seed=seed)
    return TrainingLoader(Numbers(size), order, list, batch_size=batch_size, **settings)


def take(loader, count=None):
    batches = iter(loader)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


# ---- shares of ranks ----


def test_strided_and_contiguous_shares():
    assert list(rank_indices(3, 1, 2)) == [1]
    assert list(rank_indices(10, 1, 3)) == [1, 4, 7]
    assert list(rank_indices(10, 1, 3, "contiguous")) == [3, 4, 5]


@pytest.mark.parametrize("partition", ["contiguous", "strided"])
@pytest.mark.parametrize(("rows", "world"), [(0, 1), (1, 3), (10, 3), (64, 8), (7, 7)])
def test_shares_are_disjoint_and_complete(rows, world, partition):
    shares = [list(rank_indices(rows, rank, world, partition)) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 2, 2), "rank=2: must be a whole number from 0 to 1"),
        ((5, -1, 2), "rank=-1"),
        ((5, 0, 0), "world_size=0: must be a whole number of 1 or more"),
        ((5, True, 2), "rank=True"),
        ((5, 0, 2, "blocks"), "partition='blocks': must be one of contiguous, strided"),
    ],
)
def test_bad_ranks_are_refused(arguments, message):
    with pytest.raises(InvalidConfigError, match=message):
        rank_indices(*arguments)


# ---- order and resume ----


@pytest.mark.parametrize("partition", ["contiguous", "strided"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_follow_the_stream(world, partition):
    order = RowOrder(100, seed=3)
    ranks = [
        take(make(batch_size=8 // world, rank=rank, world_size=world, partition=partition), 30)
        for rank in range(world)
    ]
    for step in range(30):
        used = [row for rank in ranks for row in rank[step]]
        expected = order.rows(8 * step, 8 * (step + 1)).tolist()
        assert sorted(used) == sorted(expected)
        if partition == "contiguous":
            assert used == expected


def resume_points(num_rows, stops, workers, worlds=(1, 2, 4, 8), global_batch=16):
    """Stop at each point, go on with another world size, and compare with the uninterrupted stream."""
    order = RowOrder([num_rows // 3, num_rows - num_rows // 3], seed=9)
    for stop, world in zip(stops, itertools.cycle(worlds)):
        first = make(num_rows, global_batch, order=order, num_workers=workers)
        used = list(itertools.chain(*take(first, stop)))
        state = json.loads(json.dumps(first.state_dict()))
        ranks = []
        for rank in range(world):
            loader = make(
                num_rows, global_batch // world, order=order, rank=rank, world_size=world, num_workers=workers
            )
            loader.load_state_dict(state)
            ranks.append(take(loader, 6))
            assert loader.state_dict()["position"] == (stop + 6) * global_batch
        used += [row for step in zip(*ranks, strict=True) for rank in step for row in rank]
        assert used == order.rows(0, (stop + 6) * global_batch).tolist(), (stop, world)


def test_resume_in_the_middle_of_an_epoch_and_across_its_end():
    resume_points(500, [0, 1, 17, 30, 31, 32, 62, 63], workers=0)


def test_resume_through_worker_processes():
    resume_points(10_000, [5, 623], workers=2, worlds=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resume_at_many_points_of_ten_thousand_rows(workers):
    stops = np.random.default_rng(workers).integers(0, 700, 200 if workers == 0 else 6).tolist()
    resume_points(10_000, stops, workers)


def test_batches_that_were_loaded_ahead_do_not_count():
    loader = make(num_workers=0, prefetch_batches=8)
    batches = iter(loader)
    used = [next(batches) for _ in range(3)]
    time.sleep(0.05)
    state = loader.state_dict()
    batches.close()
    assert state["position"] == 12 and state["epoch"] == 0
    again = make()
    again.load_state_dict(state)
    assert used + take(again, 30) == take(make(), 33)


def test_state_is_small_and_needs_no_reading():
    class Unreadable(Numbers):
        def __getitem__(self, index):
            raise AssertionError("read to fast-forward")

    order = RowOrder([10**4] * 4000, [0.5] * 4000, seed=1)
    loader = TrainingLoader(Unreadable(order.num_rows), order, list, batch_size=8, data_checksum="sha256:" + "0" * 64)
    loader.load_state_dict(loader.state_after(10**6))
    assert loader.position == 8 * 10**6
    assert len(json.dumps(loader.state_dict())) < 1024


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    take(make(num_workers=1), 2)
    take(make(), 2)
    assert torch.equal(torch.rand(3), expected)


# ---- streams that end ----


@pytest.mark.parametrize("world", [1, 3])
def test_tail_of_a_stream_that_ends(world):
    def ranks(tail):
        loaders = [make(22, 3, rank=r, world_size=world, num_epochs=2, tail=tail) for r in range(world)]
        found = [take(loader) for loader in loaders]
        assert [len(batches) for batches in found] == [len(loader) for loader in loaders]
        positions = {loader.position for loader in loaders}
        return [row for rank in found for batch in rank for row in batch], found, positions

    rows, _, positions = ranks("keep")
    assert np.bincount(rows, minlength=22).tolist() == [2] * 22 and positions == {44}
    rows, found, positions = ranks("drop")
    whole = 44 // (3 * world) * 3 * world
    assert len(rows) == whole and positions == {whole} and all(len(b) == 3 for rank in found for b in rank)
    rows, found, positions = ranks("wrap")
    assert len(rows) == -(-44 // (3 * world)) * 3 * world == positions.pop()
    assert np.bincount(rows, minlength=22).min() == 2 and all(len(b) == 3 for rank in found for b in rank)


def test_finished_stream_gives_nothing_more_and_an_endless_one_has_no_length():
    loader = make(10, 4, num_epochs=1)
    assert [len(batch) for batch in take(loader)] == [4, 4, 2] and take(loader) == []
    with pytest.raises(TypeError, match="no length"):
        len(make())


# ---- faults ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"num_workers": 1, "prefetch_batches": 0}, "prefetch_batches=0: must be a whole number of 1 or more"),
        ({"rank": 1}, "rank=1"),
        ({"tail": "pad"}, "tail='pad': must be one of keep, drop, wrap"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"order": RowOrder(7)}, "order has 7 rows, dataset 100"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InvalidConfigError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"position": -1}, InvalidConfigError, "position=-1"),
        ({"position": 1.5}, InvalidConfigError, "position=1.5"),
        ({"position": 8}, InvalidConfigError, "position=8 is row 8 of epoch 0, the state says row 0"),
        ({"schema_version": 2}, InvalidConfigError, "schema_version=2: must be 1"),
        ({"seed": 4}, ArtifactMismatchError, "seed was 4 and is 3"),
        ({"num_rows": 99}, ArtifactMismatchError, "num_rows was 99 and is 100"),
        ({"data_checksum": "sha256:b"}, ArtifactMismatchError, "data_checksum was 'sha256:b' and is 'sha256:a'"),
        ({"extra": 1}, InvalidConfigError, "must have the keys"),
        ({"position": 204, "epoch": 2, "row_in_epoch": 4}, InvalidConfigError, "the stream ends at 200"),
    ],
)
def test_wrong_states_are_refused_and_change_nothing(change, error, message):
    loader = make(num_epochs=2, data_checksum="sha256:a")
    with pytest.raises(error, match=message):
        loader.load_state_dict(loader.state_dict() | change)
    assert loader.position == 0
    with pytest.raises(InvalidConfigError, match="must have the keys"):
        loader.load_state_dict([])


def test_other_order_is_refused_unless_forced():
    state = make(seed=3).state_after(5)
    other = make(seed=4)
    with pytest.raises(ArtifactMismatchError, match="seed was 3 and is 4.*order was"):
        other.load_state_dict(state)
    other.load_state_dict(state, force=True)
    assert other.position == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_row_is_reported_with_its_error(workers):
    loader = TrainingLoader(
        Numbers(20, broken=13), RowOrder(20, shuffle=False), list, batch_size=4, num_workers=workers
    )
    batches = iter(loader)
    assert [next(batches) for _ in range(3)][-1] == [8, 9, 10, 11]
    with pytest.raises(InvalidConfigError, match="row 13: cannot be read"):
        next(batches)
    assert loader.position == 12


# ---- working ahead ----


def test_prefetch_waits_for_a_slow_consumer():
    made = []
    gate = threading.Semaphore(0)

    def source():
        for number in range(100):
            made.append(number)
            gate.release()
            yield number

    items = prefetch(source(), 3)
    assert next(items) == 0
    for _ in range(5):  # one was taken, three wait, one is in the hands of the thread
        assert gate.acquire(timeout=10)
    assert not gate.acquire(timeout=0.2) and len(made) == 5
    assert list(items) == list(range(1, 100))


def test_prefetch_passes_errors_on_and_ends_its_thread():
    def source():
        yield 1
        raise ValueError("broken")

    items = prefetch(source(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)
    endless = prefetch(itertools.count(), 2)
    next(endless)
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "cognexis-prefetch"]
    with pytest.raises(InvalidConfigError, match="depth=0"):
        prefetch([], 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_queue_never_exceeds_its_limit_and_is_counted(workers):
    loader = make(num_workers=workers, prefetch_batches=2)
    batches = iter(loader)
    for _ in range(6):
        next(batches)
        time.sleep(0.02)
    batches.close()
    assert loader.metrics.max_queue_depth <= 2 * max(1, workers) + 1
    assert loader.metrics.batches == 6 and loader.metrics.rows == 24
    assert set(loader.metrics.as_dict()) == {"data/batches", "data/load_ms", "data/wait_ms", "data/queue_depth"}
    assert loader.metrics.load_seconds > 0


# ---- plain and prepared DataLoaders ----


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2)])
def test_prepared_loaders_follow_the_stream_from_any_position(world, workers):
    order = RowOrder(64, seed=6)
    position = 64 + 16
    ranks = []
    for rank in range(world):
        loader = DataLoader(Numbers(64), 8 // world, sampler=RowSampler(order, position), num_workers=workers)
        prepared = prepare_data_loader(
            loader, num_processes=world, process_index=rank, put_on_device=False, dispatch_batches=False
        )
        ranks.append([batch.tolist() for batch in prepared])
    used = [row for step in zip(*ranks, strict=True) for rank in step for row in rank]
    assert used == order.rows(position, 128).tolist()


def test_sampler_goes_on_with_the_next_epoch():
    order = RowOrder(10, seed=1)
    sampler = RowSampler(order, 13)
    assert len(sampler) == 7 and list(sampler) == order.rows(13, 20).tolist()
    assert len(sampler) == 10 and list(sampler) == order.rows(20, 30).tolist()
    next(iter(sampler))
    assert sampler.position == 30
    with pytest.raises(InvalidConfigError, match="position=-1"):
        sampler.seek(-1)
