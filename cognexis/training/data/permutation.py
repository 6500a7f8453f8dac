"""A permutation of 0 .. N-1 that is computed and not stored, chosen by a key.

A Feistel network over the smallest number of bits that holds N (at least 4): with x = (L, R) split into a and b bits,

    L <- L xor (mix(R xor k_i) mod 2^a),    R <- R xor (mix(L xor k_{i+1}) mod 2^b),    i = 0, 2, 4, ...

Each line can be undone, so the network permutes 0 .. 2^(a+b) - 1 whatever ``mix`` is. A result of N or more is put
through again until it lies below N (cycle walking), and what is left is a permutation of 0 .. N-1. Above N = 8 this
takes less than two passes on average, as 2^(a+b) < 2 N. ``mix`` is the finaliser of splitmix64 (Steele, Lea and Flood
2014, doi:10.1145/2660193.2660195); the round keys k_i come from SHA-256 of the key.

Any element costs the same few operations, so reading may begin anywhere, and memory does not grow with N.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from cognexis.errors import InvalidConfigError

_ROUNDS = 12
_LARGEST = 2**62
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


class KeyedPermutation:
    """One permutation of ``range(size)``.

    Args:
        size: N, 0 to 2^62.
        key: what chooses the permutation, such as (seed, epoch); integers and strings.

    Raises:
        InvalidConfigError: ``size`` is out of range.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        if not 0 <= size <= _LARGEST:
            raise InvalidConfigError(f"size={size}: must lie in 0 to 2^62", path="size", value=size)
        self.size = size
        bits = max(4, (size - 1).bit_length())
        self._high = bits // 2
        self._low = bits - self._high
        seed = repr((size, *key)).encode()
        digests = (hashlib.sha256(seed + bytes([index])).digest() for index in range(_ROUNDS))
        self._keys = [np.uint64(int.from_bytes(digest[:8], "big")) for digest in digests]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The elements at ``positions`` ``[n]``, each in 0 .. N-1."""
        if self.size <= 1:
            return np.zeros_like(positions)
        values = self._network(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = again = self._network(values[outside])
            outside = outside[again >= self.size]
        return values.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low_bits = np.uint64(self._low)
        low_mask, high_mask = np.uint64(2**self._low - 1), np.uint64(2**self._high - 1)
        high, low = values >> low_bits, values & low_mask
        for index in range(0, _ROUNDS, 2):
            high = high ^ (_mix(low ^ self._keys[index]) & high_mask)
            low = low ^ (_mix(high ^ self._keys[index + 1]) & low_mask)
        return (high << low_bits) | low


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> _SHIFT_1)) * _MULTIPLIER_1
    values = (values ^ (values >> _SHIFT_2)) * _MULTIPLIER_2
    return values ^ (values >> _SHIFT_3)
