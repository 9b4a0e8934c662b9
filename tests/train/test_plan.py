"""The batch plan: pure, complete, and found at any step without walking there."""

from collections import Counter

import numpy as np
import pytest

from shared.errors import InputError
from shared.spec import Bucket
from train.plan import BatchPlan, rank_slice, select_buckets

SMALL, LARGE, TINY = Bucket(1, 8, 8), Bucket(4, 16, 8), Bucket(2, 8, 16)
ROWS = {SMALL: np.arange(0, 13), LARGE: np.arange(13, 42), TINY: np.arange(42, 44)}


def plan(seed: int = 3, batch_size: int = 4) -> BatchPlan:
    return BatchPlan(ROWS, batch_size=batch_size, seed=seed)


def test_every_sample_is_taken_once_an_epoch_and_nothing_is_dropped():
    taken: Counter[tuple[int, int]] = Counter()
    whole = plan()
    for step in range(whole.first_step(8)):  # 8 epochs of 13, 29 and 2 samples: each stream ends on a batch
        batch = whole.batch(step)
        taken.update(zip(batch.rows.tolist(), batch.epochs.tolist(), strict=True))
    assert taken == Counter({(row, epoch): 1 for row in range(44) for epoch in range(8)})


def test_a_batch_holds_one_bucket_and_has_the_full_size():
    for step in range(50):
        batch = plan().batch(step)
        assert len(batch.rows) == 4
        assert set(batch.rows.tolist()) <= set(ROWS[batch.bucket].tolist())


def test_a_step_found_afresh_is_the_one_found_by_walking():
    walked = plan()
    for step in range(200):
        batch, fresh = walked.batch(step), plan().batch(step)
        assert batch.bucket == fresh.bucket
        assert np.array_equal(batch.rows, fresh.rows)
        assert np.array_equal(batch.epochs, fresh.epochs)


def test_epochs_and_seeds_have_other_orders():
    first, second = ([plan().batch(s).rows.tolist() for s in range(e * 11, e * 11 + 10)] for e in (0, 1))
    assert first != second
    assert first != [plan(seed=4).batch(s).rows.tolist() for s in range(10)]


def test_a_bucket_smaller_than_the_batch_fills_it_from_several_epochs():
    lone = BatchPlan({TINY: np.array([7, 9])}, batch_size=5, seed=0)
    batch = lone.batch(1)
    assert batch.epochs.tolist() == [2, 3, 3, 4, 4]
    assert sorted(batch.rows[1:3].tolist()) == [7, 9]


def test_a_far_step_of_a_large_index_is_found_at_once():
    large = BatchPlan({SMALL: np.arange(100_000)}, batch_size=64, seed=0)
    step = 10**9
    epoch = large.epoch_of(step)
    assert large.first_step(epoch) <= step < large.first_step(epoch + 1)
    assert set(large.batch(step).epochs.tolist()) <= {epoch, epoch - 1}


def test_ranks_share_the_batch_and_a_batch_that_they_do_not_divide_is_refused():
    assert [rank_slice(6, rank, 3) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(InputError, match="batch_size=6 is not divisible by 4 ranks: use 4 or 8"):
        rank_slice(6, 0, 4)


def test_buckets_are_chosen_by_name_and_a_missing_one_names_those_there():
    assert list(select_buckets(ROWS, ["4x16x8"])) == [LARGE]
    assert select_buckets(ROWS, []) == ROWS
    with pytest.raises(InputError, match="bucket 5x8x8: the cache holds 1x8x8, 2x8x16, 4x16x8"):
        select_buckets(ROWS, ["5x8x8"])
