"""Pseudo-random numbers and orders that are computed, not kept: each a pure function of its key.

They are built from 64-bit integer arithmetic alone, so the same key gives the same order with every version of every
library, and a run can go on years later.
"""

import math

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_TABLE_LENGTH = 1 << 16
_ROUNDS = 6


def hash_words(*parts: npt.ArrayLike) -> Words:
    """Returns 64 well mixed bits for each element of the broadcast ``parts``, integers of up to 64 bits.

    The finaliser is splitmix64's (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(words: Words) -> npt.NDArray[np.float64]:
    """Returns numbers from [0, 1), one for each of ``words``."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Permutation:
    """An order of ``0 .. length - 1``, found place by place: beyond 65,536 neither memory nor time grows with it.

    Short ones are the order of hashed numbers. Long ones are a Feistel network over pairs (x // side, x % side) with
    side = ceil(sqrt(length)); the few results beyond ``length`` walk on until they are inside, which keeps it a
    permutation (Black, Rogaway: Ciphers with arbitrary finite domains, 2002).
    """

    def __init__(self, length: int, key: int) -> None:
        assert 0 < length < 1 << 62, length
        self._length, self._key, self._table = length, key, None
        self._side = np.uint64(math.isqrt(length - 1) + 1)
        if length <= _TABLE_LENGTH:
            self._table = np.argsort(hash_words(key, np.arange(length)), kind="stable")

    def at(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns what stands at ``places``."""
        if self._table is not None:
            return self._table[places]
        values = self._forward(places.astype(np.uint64))
        while (outside := values >= np.uint64(self._length)).any():
            values[outside] = self._forward(values[outside])
        return values.astype(np.int64)

    def place_of(self, value: int) -> int:
        """Returns the place at which ``value`` stands."""
        if self._table is not None:
            return int(np.flatnonzero(self._table == value)[0])
        place = np.array([value], dtype=np.uint64)
        while True:
            place = self._backward(place)
            if place[0] < self._length:
                return int(place[0])

    def _forward(self, values: Words) -> Words:
        left, right = values // self._side, values % self._side
        for number in range(_ROUNDS):
            left, right = right, (left + hash_words(self._key, number, right) % self._side) % self._side
        return left * self._side + right

    def _backward(self, values: Words) -> Words:
        left, right = values // self._side, values % self._side
        for number in reversed(range(_ROUNDS)):
            added = hash_words(self._key, number, left) % self._side
            left, right = (right + self._side - added) % self._side, left
        return left * self._side + right
