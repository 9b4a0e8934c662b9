"""How flat gradients are cut."""

import itertools
import random

import pytest

from train.parallel.buckets import cut_into_buckets


@pytest.mark.parametrize(("num_ranks", "largest"), [*itertools.product((1, 2, 3, 8), (1, 7, 64, 10_000))])
def test_buckets_hold_every_value_once_in_order_each_within_what_its_owner_has(num_ranks, largest):
    sizes = random.Random(largest).choices((1, 2, 5, 33, 400), k=20)
    part = -(-sum(sizes) // num_ranks) + 1  # the last rank's reaches beyond the parameters
    buckets = cut_into_buckets(sizes, part=part, largest=largest)
    held = [
        (each.parameter, value)
        for bucket in buckets
        for each in bucket.slices
        for value in range(each.start, each.start + each.numel)
    ]
    assert held == [(number, value) for number, size in enumerate(sizes) for value in range(size)]
    begin = 0
    for bucket in buckets:
        assert bucket.owner * part + bucket.offset == begin
        assert 0 < bucket.numel <= min(largest, part - bucket.offset)
        begin += bucket.numel


def test_a_rank_beyond_the_parameters_owns_no_bucket():
    assert {bucket.owner for bucket in cut_into_buckets([3, 1], part=2, largest=9)} == {0, 1}
    assert cut_into_buckets([3, 1], part=4, largest=9)[-1].owner == 0
    assert cut_into_buckets([], part=2, largest=9) == []
