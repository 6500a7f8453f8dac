"""The training loader: batches in the order of a :class:`RowOrder`, exactly resumable.

With W ranks and b rows a rank, the step at stream position P reads the positions P .. P + W b - 1 and hands each rank
its share (see ``partition.py``). So the rows of all ranks together follow the stream, whatever W, b and the number of
workers are, and the whole state is P. A batch counts as consumed when it is handed out; what workers have read ahead
does not count and is read again after a resume.

By default the stream has no end: batches run over the end of an epoch, every batch is full, and nothing is dropped or
repeated. With ``num_epochs`` it ends, and ``tail`` says what the last batch is.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cognexis.errors import InvalidConfigError
from cognexis.training.data.loader_state import check_state, make_state
from cognexis.training.data.metrics import LoaderMetrics
from cognexis.training.data.order import RowOrder
from cognexis.training.data.partition import check_partition, check_rank, rank_indices
from cognexis.training.data.prefetch import prefetch

TAILS = ("keep", "drop", "wrap")
_POSITIONS_AT_ONCE = 4096


class TrainingLoader:
    """Batches of one rank.

    Args:
        dataset: map-style rows, as many as ``order`` has.
        order: which row stands where in the stream.
        collate: makes a batch of a list of rows.
        batch_size: rows of a batch on this rank.
        rank: this process, 0 to ``world_size`` - 1.
        world_size: processes that read the stream together.
        partition: which rows of a step a rank gets, ``contiguous`` or ``strided``.
        num_workers: processes that load; 0 loads in a thread of this one.
        prefetch_batches: finished batches that may wait, for each worker; 0, without workers, loads on demand.
        num_epochs: where the stream ends; None means never.
        tail: the last batch of a stream that ends: ``keep`` shares out what is left, ``drop`` leaves it out,
            ``wrap`` fills the batch from the next epoch.
        data_checksum: of the data's manifest; goes into the state and is compared on a resume.
        pin_memory: put batches into page-locked memory.

    Raises:
        InvalidConfigError: a setting is out of range.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: RowOrder,
        collate: Callable[[list[Any]], Any],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        partition: str = "contiguous",
        num_workers: int = 0,
        prefetch_batches: int = 2,
        num_epochs: int | None = None,
        tail: str = "keep",
        data_checksum: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        check_rank(rank, world_size)
        check_partition(partition)
        _check_count("batch_size", batch_size, 1)
        _check_count("num_workers", num_workers, 0)
        _check_count("prefetch_batches", prefetch_batches, 1 if num_workers else 0)
        if num_epochs is not None:
            _check_count("num_epochs", num_epochs, 1)
        if tail not in TAILS:
            raise InvalidConfigError(f"tail={tail!r}: must be one of {', '.join(TAILS)}", path="tail", value=tail)
        if len(dataset) != order.num_rows:  # type: ignore[arg-type]
            raise InvalidConfigError(f"order has {order.num_rows} rows, dataset {len(dataset)}")  # type: ignore[arg-type]
        self.dataset, self.order, self.collate = dataset, order, collate
        self.batch_size, self.rank, self.world_size, self.partition = batch_size, rank, world_size, partition
        self.num_workers, self.prefetch_batches, self.pin_memory = num_workers, prefetch_batches, pin_memory
        self.tail, self.data_checksum = tail, data_checksum
        self.end = None if num_epochs is None else num_epochs * order.rows_per_epoch
        self.position = 0
        self.metrics = LoaderMetrics()

    @property
    def rows_per_step(self) -> int:
        """Rows that all ranks together read for one batch each."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> int:
        """The epoch that the next row belongs to, from 0."""
        return self.position // self.order.rows_per_epoch

    def __len__(self) -> int:
        """Batches of a stream that ends, from its beginning; TypeError where it has no end."""
        if self.end is None:
            raise TypeError("a loader without num_epochs has no length")
        return sum(1 for _ in self._spans(0))

    def __iter__(self) -> Iterator[Any]:
        """Batches from the current position on."""
        start = self.position
        produced = multiprocessing.Value("q", 0)
        rows = _CollatedRows(self.dataset, self.collate, produced)
        loader: DataLoader[Any] = DataLoader(
            rows,
            batch_sampler=_IndexBatches(self, start),
            collate_fn=_only_item,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_batches if self.num_workers else None,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(0),  # otherwise it would draw from the global one
        )
        in_thread = self.num_workers == 0 and self.prefetch_batches > 0
        batches = prefetch(loader, self.prefetch_batches) if in_thread else iter(loader)
        try:
            for taken, (_, stop) in enumerate(self._shares(start)):
                began = time.perf_counter()
                batch, num_rows, seconds = next(batches)
                waiting = max(0, produced.value - taken - 1)
                self.metrics.taken(num_rows, seconds, time.perf_counter() - began, waiting)
                self.position = stop
                yield batch
        finally:
            if in_thread:
                batches.close()  # type: ignore[union-attr]
        if self.end is not None and self.tail != "drop":
            self.position = max(self.position, self.end)

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch that was handed out; equal on all ranks, less than 1 KiB of JSON."""
        return make_state(self.position, self.order, self.data_checksum)

    def state_after(self, num_batches: int) -> dict[str, Any]:
        """The state when every rank has used ``num_batches`` batches since position 0."""
        return make_state(num_batches * self.rows_per_step, self.order, self.data_checksum)

    def load_state_dict(self, state: dict[str, Any], *, force: bool = False) -> None:
        """Go on where ``state`` was taken, with any number of ranks, rows a rank and workers.

        Args:
            state: of :meth:`state_dict`.
            force: accept another order or other data; the position is kept.

        Raises:
            InvalidConfigError: not a state, or a position that this stream does not have.
            ArtifactMismatchError: the state belongs to another order or other data; the message lists what differs.
        """
        end = None if self.tail == "wrap" else self.end
        self.position = check_state(state, self.order, self.data_checksum, end, force)

    def _spans(self, position: int) -> Iterator[tuple[int, int]]:
        """Start and end in the stream of each step."""
        while self.end is None or position < self.end:
            stop = position + self.rows_per_step
            if self.end is not None and stop > self.end and self.tail != "wrap":
                if self.tail == "drop":
                    return
                stop = self.end
            yield position, stop
            position = stop

    def _shares(self, position: int) -> Iterator[tuple[range, int]]:
        """Positions of this rank, and the end of the step, for each step in which the rank has any."""
        for start, stop in self._spans(position):
            share = rank_indices(stop - start, self.rank, self.world_size, self.partition)
            if len(share):
                yield range(start + share.start, start + share.stop, share.step), stop


class _IndexBatches:
    """Row numbers of each batch of a rank, computed many positions at a time."""

    def __init__(self, loader: TrainingLoader, start: int) -> None:
        self.loader, self.start = loader, start

    def __iter__(self) -> Iterator[list[int]]:
        rows, first = np.empty(0, np.int64), self.start
        for share, stop in self.loader._shares(self.start):
            if stop > first + len(rows):
                first = share.start
                rows = self.loader.order.rows(first, max(stop, first + _POSITIONS_AT_ONCE))
            yield rows[share.start - first : share.stop - first : share.step].tolist()


class _CollatedRows(Dataset[Any]):
    """Loads a whole batch at once and says how long it took."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], produced: Any) -> None:
        self.dataset, self.collate, self.produced = dataset, collate, produced

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int, float]]:
        began = time.perf_counter()
        fetch = getattr(self.dataset, "__getitems__", None)
        rows = fetch(indices) if fetch is not None else [self.dataset[index] for index in indices]
        item = self.collate(rows), len(indices), time.perf_counter() - began
        with self.produced.get_lock():
            self.produced.value += 1
        return [item]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def _only_item(items: list[Any]) -> Any:
    return items[0]


def _check_count(name: str, value: Any, lowest: int) -> None:
    if type(value) is not int or value < lowest:
        raise InvalidConfigError(
            f"{name}={value!r}: must be a whole number of {lowest} or more", path=name, value=value
        )
