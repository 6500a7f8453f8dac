"""The order in which rows are read: row(P) is a function of the stream position P and of nothing else.

The stream never ends; epoch e covers the positions e N .. (e + 1) N - 1. With parts (shards) of n_i rows and weights
w_i, part i has m_i = round(w_i n_i) places in an epoch, at least one, and N = sum of m_i. For a position P

    e = floor(P / N),   v = pi_e(P mod N)                    the place: part i, and its j-th place there
    g = e m_i + j                                            how many rows of the part came before
    row = offset_i + sigma_{i, floor(g / n_i)}(g mod n_i)    a row of the part

pi_e permutes the epoch and sigma_{i, k} the k-th pass over part i (``KeyedPermutation``, keyed by seed, epoch, part,
pass); sigma is the identity where m_i = n_i, since pi_e mixes enough. So with weights of 1 each epoch reads every row
once; with any weights, a part is read in whole passes, and no row comes again before every row of its part has come.
With ``window`` pi_e moves only whole windows of that many places and the places inside each window, for storage that
is slow at random access; the last window, if it is shorter, stays at the end. Without ``shuffle`` all permutations are
the identity.

No state but P is needed to go on anywhere, at once, with any number of ranks and workers.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cognexis.errors import InvalidConfigError
from cognexis.training.data.permutation import KeyedPermutation

_MOST_ROWS = 2**48


class RowOrder:
    """The endless stream of row numbers over one or several parts.

    Args:
        counts: rows n_i of each part; a single number means one part.
        weights: w_i, how often a row of the part is read in an epoch on average; None means 1 for all.
        seed: chooses the order.
        shuffle: False reads part after part, row after row.
        window: places of a shuffle window; None shuffles the whole epoch.

    Raises:
        InvalidConfigError: a count, weight, seed or window is out of range; the message names it.
    """

    def __init__(
        self,
        counts: int | Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        window: int | None = None,
    ) -> None:
        self.counts = (counts,) if isinstance(counts, int) else tuple(counts)
        self.weights = tuple(map(float, weights)) if weights is not None else (1.0,) * len(self.counts)
        self.seed, self.shuffle, self.window = seed, shuffle, window
        self._check()
        self.places = tuple(max(1, round(w * n)) for w, n in zip(self.weights, self.counts, strict=True))
        self.num_rows = sum(self.counts)
        self.rows_per_epoch = sum(self.places)
        self._offsets: NDArray[np.int64] = np.array([0, *itertools.accumulate(self.counts)], np.int64)
        self._place_ends = np.cumsum(self.places, dtype=np.int64)
        self._place_starts = self._place_ends - np.array(self.places, np.int64)
        self._is_redrawn = np.array(self.places) != np.array(self.counts)

    def _check(self) -> None:
        _require("counts", self.counts, bool(self.counts), "must name at least one part")
        for index, count in enumerate(self.counts):
            valid = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            _require(f"counts[{index}]", count, valid, "must be a whole number of 1 or more")
        _require("counts", sum(self.counts), sum(self.counts) <= _MOST_ROWS, "at most 2^48 rows")
        equal = len(self.weights) == len(self.counts)
        _require("weights", self.weights, equal, f"must be as many as there are parts, {len(self.counts)}")
        for index, weight in enumerate(self.weights):
            valid = math.isfinite(weight) and 0 < weight <= 2**20
            _require(f"weights[{index}]", weight, valid, "must be finite, above 0 and at most 2^20")
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and self.seed >= 0
        _require("seed", self.seed, is_seed, "must be a whole number of 0 or more")
        is_window = self.window is None or (type(self.window) is int and self.window >= 1)
        _require("window", self.window, is_window, "must be None or a whole number of 1 or more")

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Row numbers ``[stop - start]`` at the stream positions ``start`` .. ``stop`` - 1."""
        if not 0 <= start <= stop:
            raise InvalidConfigError(f"positions {start} to {stop}: must rise from 0 or more", path="start")
        parts, size = [], self.rows_per_epoch
        while start < stop:
            epoch, first = divmod(start, size)
            last = min(size, first + stop - start)
            parts.append(self._epoch_rows(epoch, np.arange(first, last)))
            start += last - first
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def parts_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part that each row number belongs to."""
        return np.searchsorted(self._offsets[1:], rows, side="right")

    def fingerprint(self) -> str:
        """``sha256:...`` of everything that determines the order; equal fingerprints give equal rows."""
        content = [self.counts, self.weights, self.seed, self.shuffle, self.window]
        return f"sha256:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"

    def _epoch_rows(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        places = self._shuffled(epoch, positions) if self.shuffle else positions
        part_of = np.searchsorted(self._place_ends, places, side="right")
        within = places - self._place_starts[part_of]
        for part in np.unique(part_of[self._is_redrawn[part_of]]):
            chosen = part_of == part
            within[chosen] = self._part_rows(int(part), epoch * self.places[part] + within[chosen])
        return self._offsets[part_of] + within

    def _part_rows(self, part: int, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows inside a part, by how many of its rows came before (g)."""
        passes, within = np.divmod(drawn, self.counts[part])
        if not self.shuffle:
            return within
        rows = np.empty_like(within)
        for number in np.unique(passes):
            chosen = passes == number
            rows[chosen] = self._permutation(self.counts[part], "part", part, int(number))(within[chosen])
        return rows

    def _shuffled(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.window is None or self.window >= self.rows_per_epoch:
            return self._permutation(self.rows_per_epoch, "epoch", epoch)(positions)
        full = self.rows_per_epoch // self.window
        windows, within = np.divmod(positions, self.window)
        is_full = windows < full
        source = windows.copy()
        source[is_full] = self._permutation(full, "windows", epoch)(windows[is_full])
        places = np.empty_like(positions)
        for number in np.unique(source):
            chosen = source == number
            length = self.window if number < full else self.rows_per_epoch - full * self.window
            inner = self._permutation(length, "window", epoch, int(number))(within[chosen])
            places[chosen] = number * self.window + inner
        return places

    def _permutation(self, size: int, *key: int | str) -> KeyedPermutation:
        return _permutation(size, self.seed, *key)


@lru_cache(maxsize=4096)
def _permutation(size: int, *key: int | str) -> KeyedPermutation:
    return KeyedPermutation(size, *key)


def _require(name: str, value: Any, is_valid: bool, rule: str) -> None:
    if not is_valid:
        raise InvalidConfigError(f"{name}={value!r}: {rule}", path=name, value=value)
