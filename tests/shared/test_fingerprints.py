"""Fingerprints of strings, and finding them."""

import numpy as np
import pyarrow as pa

from shared.fingerprints import Lookup, fingerprints, with_times

TEXTS = ["", "a", "b", "ab", "ba", "aa", "aaa", "a\x00", "\x00a", "näht", "x" * 10_000, "x" * 9_999, "x" * 4096]


def test_different_strings_have_different_fingerprints_wherever_they_stand() -> None:
    together = fingerprints(pa.array(TEXTS))
    assert len(np.unique(together)) == len(TEXTS)
    for place, text in enumerate(TEXTS):
        assert fingerprints(pa.array([text])) == together[place]
    moved = pa.chunked_array([pa.array(["z", *TEXTS[:4]])[1:], pa.array(TEXTS[4:])])
    assert (fingerprints(moved) == together).all()
    assert (fingerprints(moved.cast(pa.large_string())) == together).all()


def test_times_tell_parts_of_a_clip_from_each_other() -> None:
    seconds = [None, *(n / 4 for n in range(200))]
    pairs = [(start, end) for start in seconds for end in seconds]
    starts, ends = (pa.chunked_array([pa.array(column, pa.float64())]) for column in zip(*pairs, strict=True))
    numbers = with_times(fingerprints(pa.array(["a"] * len(pairs))), starts, ends)
    assert len(np.unique(numbers)) == len(pairs)
    whole = with_times(fingerprints(pa.array(["a"])), *[pa.chunked_array([pa.nulls(1, pa.float64())])] * 2)
    assert numbers[0] == whole[0]


def test_numbers_are_found_where_they_stand_last() -> None:
    numbers = np.array([[1, 1], [2, 2], [1, 1], [1, 3], [5, 5]], np.uint64)
    wanted = np.array([[1, 1], [1, 3], [1, 2], [5, 5], [9, 9], [0, 0], [2, 2]], np.uint64)
    assert Lookup(numbers).find(wanted).tolist() == [2, 3, -1, 4, -1, -1, 1]
    assert len(Lookup(numbers)) == 4
    assert Lookup(numbers[:, 0]).find(wanted[:, 0]).tolist() == [3, 3, 3, 4, -1, -1, 1]


def test_nothing_is_found_in_nothing() -> None:
    assert Lookup(np.empty((0, 2), np.uint64)).find(np.ones((2, 2), np.uint64)).tolist() == [-1, -1]
