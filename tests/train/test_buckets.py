"""How flat gradients are cut."""

import itertools
import random

import pytest

from train.parallel.buckets import BUCKET_ELEMENTS, cut_into_buckets, largest_bucket


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("num_ranks", "largest"), [*itertools.product((1, 2, 3, 8), (1, 7, 64, 10_000))])
def test_buckets_hold_every_value_once_in_order_and_every_rank_what_is_its_own(num_ranks, largest, shared):
    sizes = random.Random(largest).choices((1, 2, 5, 33, 400), k=20)
    part = -(-sum(sizes) // num_ranks) + 1  # the last rank's reaches beyond the parameters
    buckets = cut_into_buckets(sizes, part=part, largest=largest, shared_below=part + shared)
    held = [
        (each.parameter, value)
        for bucket in buckets
        for each in bucket.slices
        for value in range(each.start, each.start + each.numel)
    ]
    assert held == [(number, value) for number, size in enumerate(sizes) for value in range(size)]
    begin = 0
    for bucket in buckets:
        owners = [(bucket.start + value) // part for value in range(bucket.numel)]
        assert bucket.start == begin
        assert bucket.numel == min(largest, sum(sizes) - begin) if shared else 0 < bucket.numel <= largest
        assert bucket.owner == (owners[0] if owners[0] == owners[-1] else None)
        assert shared or bucket.owner is not None
        for rank in range(num_ranks):
            assert owners[bucket.held(rank, part)] == [rank] * owners.count(rank)
        begin += bucket.numel


def test_a_rank_beyond_the_parameters_owns_no_bucket():
    assert {bucket.owner for bucket in cut_into_buckets([3, 1], part=2, largest=9, shared_below=0)} == {0, 1}
    (shared,) = cut_into_buckets([3, 1], part=2, largest=9)
    assert shared.owner is None
    assert [shared.held(rank, 2) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 4)]
    assert cut_into_buckets([3, 1], part=4, largest=9)[-1].owner == 0
    assert cut_into_buckets([], part=2, largest=9) == []


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 9, 1000])
def test_what_the_largest_bucket_holds_is_known_without_cutting(num_ranks):
    total = 2**26
    part = -(-total // num_ranks)
    buckets = cut_into_buckets([total // 4] * 4, part=part, largest=BUCKET_ELEMENTS)
    assert largest_bucket(total, part) == max(bucket.numel for bucket in buckets)
