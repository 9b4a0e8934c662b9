"""The batch plan: pure, complete, and found at any step without walking there."""

import resource
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from shared.errors import InputError
from shared.spec import Bucket
from train.bucket_walk import BucketRows, BucketWalk
from train.permutation import Permutation
from train.plan import BatchPlan, batch_sizes_by_tokens, rank_slots, select_buckets

SMALL, LARGE, TINY = Bucket(1, 8, 8), Bucket(4, 16, 8), Bucket(2, 8, 16)
ROWS = {
    SMALL: BucketRows(first_row=0, num_samples=13, run_samples=3),
    LARGE: BucketRows(first_row=13, num_samples=29, run_samples=4),
    TINY: BucketRows(first_row=42, num_samples=2, run_samples=5),
}
BATCH = {SMALL: 4, LARGE: 6, TINY: 4}


def plan(seed: int = 3) -> BatchPlan:
    return BatchPlan(ROWS, batch_sizes=BATCH, seed=seed)


def test_every_sample_is_taken_once_an_epoch_and_nothing_is_dropped():
    taken: Counter[tuple[int, int]] = Counter()
    whole = plan()
    for step in range(whole.first_step(12)):  # 12 epochs of 13, 29 and 2 samples: each bucket ends on a batch
        batch = whole.batch(step)
        taken.update(zip(batch.rows.tolist(), batch.epochs.tolist(), strict=True))
    assert taken == Counter({(row, epoch): 1 for row in range(44) for epoch in range(12)})


def test_a_tail_shares_a_batch_with_the_beginning_of_the_next_epoch():
    lone = BatchPlan({SMALL: ROWS[SMALL]}, batch_sizes=BATCH, seed=0)
    assert [lone.batch(step).epochs.tolist() for step in (2, 3, 6)] == [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 2, 2]]


def test_a_batch_holds_one_bucket_and_has_the_full_size():
    for step in range(50):
        batch = plan().batch(step)
        first = ROWS[batch.bucket].first_row
        assert len(batch.rows) == BATCH[batch.bucket]
        assert set(batch.rows.tolist()) <= set(range(first, first + ROWS[batch.bucket].num_samples))


def test_a_step_found_afresh_is_the_one_found_by_walking():
    walked = plan()
    for step in range(200):
        batch, fresh = walked.batch(step), plan().batch(step)
        assert (batch.bucket, batch.number) == (fresh.bucket, fresh.number)
        assert np.array_equal(batch.rows, fresh.rows)
        assert np.array_equal(batch.epochs, fresh.epochs)


def test_the_batches_of_a_bucket_come_in_their_order_and_mixed_with_the_other_buckets():
    places = [plan().locate(step) for step in range(300)]
    for bucket in ROWS:
        numbers = [number for b, number in places if b == bucket]
        assert numbers == list(range(len(numbers)))
    large = [bucket == LARGE for bucket, _ in places]
    for start in range(0, 290, 10):
        assert 3 <= sum(large[start : start + 10]) <= 8  # 29/6 of 13/4 + 29/6 + 2/4 batches: 56 %


def test_ranks_take_the_parts_of_one_batch_whatever_their_number():
    for step in (0, 7, 31):
        whole = plan().batch(step)
        size = len(whole.rows)
        for world_size in (n for n in range(1, size + 1) if size % n == 0):
            parts = [plan().batch(step, rank_slots(size, rank, world_size)) for rank in range(world_size)]
            assert np.concatenate([part.rows for part in parts]).tolist() == whole.rows.tolist()
            assert np.concatenate([part.epochs for part in parts]).tolist() == whole.epochs.tolist()


def test_a_slot_takes_the_samples_of_one_run_before_the_next_and_knows_them_beforehand():
    rows = BucketRows(first_row=100, num_samples=1000, run_samples=8)
    walk = BucketWalk(rows, batch_size=5, key=9)
    for slot in range(5):
        number = 0
        while number < 600:  # three epochs of 200 batches
            visit = walk.visit(number, slot)
            assert 1 <= len(visit.rows) <= 8
            assert {(row - 100) // 8 for row in visit.rows} == {visit.run}
            for offset, row in enumerate(visit.rows):
                taken, epochs = walk.take(number + offset, slice(slot, slot + 1))
                assert (taken.tolist(), epochs.tolist()) == ([row], [visit.epoch])
            number += len(visit.rows)
        assert number == 600  # a visit ends with its epoch


def test_runs_are_read_once_an_epoch_but_where_two_slots_meet():
    walk = BucketWalk(BucketRows(first_row=0, num_samples=800, run_samples=8), batch_size=4, key=1)
    visits = Counter()
    for slot in range(4):
        number = 0
        while number < 200:
            visit = walk.visit(number, slot)
            visits[visit.run] += 1
            number += len(visit.rows)
    assert sum(visits.values()) <= 100 + 3
    assert len(visits) == 100


def test_epochs_and_seeds_have_other_orders_of_runs_and_inside_runs():
    rows = BucketRows(first_row=0, num_samples=512, run_samples=8)
    walks = [BucketWalk(rows, batch_size=1, key=key) for key in (5, 6)]

    def runs(walk: BucketWalk, epoch: int) -> list[int]:
        return [walk.visit(512 * epoch + 8 * i, 0).run for i in range(64)]

    def inside(walk: BucketWalk, epoch: int) -> list[tuple[int, ...]]:
        visits = sorted((walk.visit(512 * epoch + 8 * i, 0) for i in range(64)), key=lambda visit: visit.run)
        return [tuple(row % 8 for row in visit.rows) for visit in visits]

    assert sorted(runs(walks[0], 0)) == list(range(64))
    for order in (runs, inside):
        assert order(walks[0], 0) != order(walks[0], 1)
        assert order(walks[0], 0) != order(walks[1], 0)
    assert len(set(inside(walks[0], 0))) > 60


def test_a_bucket_smaller_than_the_batch_fills_it_from_several_epochs():
    lone = BatchPlan({TINY: BucketRows(first_row=7, num_samples=2, run_samples=1)}, batch_sizes={TINY: 5}, seed=0)
    batch = lone.batch(1)
    assert batch.epochs.tolist() == [2, 3, 3, 4, 4]
    assert sorted(batch.rows[1:3].tolist()) == [7, 8]


def test_a_far_step_of_a_large_index_is_found_at_once():
    rows = {
        SMALL: BucketRows(first_row=0, num_samples=10**8, run_samples=16),
        LARGE: BucketRows(first_row=10**8, num_samples=10**7 + 1, run_samples=4),
    }
    large = BatchPlan(rows, batch_sizes={SMALL: 64, LARGE: 16}, seed=0)
    step = 10**9
    epoch = large.epoch_of(step)
    assert large.first_step(epoch) <= step < large.first_step(epoch + 1)
    assert set(large.batch(step).epochs.tolist()) <= {epoch, epoch - 1}


PLAN_TEN_MILLION = """
import resource, time
import numpy as np
from shared.spec import Bucket
from train.bucket_walk import BucketRows
from train.plan import BatchPlan
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
bucket = Bucket(1, 8, 8)
rows = BucketRows(first_row=0, num_samples=10**7, run_samples=16)
plan = BatchPlan({bucket: rows}, batch_sizes={bucket: 1024}, seed=0)
seen = np.zeros(10**7, dtype=np.uint8)
for step in range(10**7 // 1024 + 1):
    batch = plan.batch(step)
    seen[batch.rows[batch.epochs == 0]] += 1
assert (seen == 1).all()
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_an_epoch_of_ten_million_samples_is_planned_in_seconds_and_little_memory():
    done = subprocess.run([sys.executable, "-c", PLAN_TEN_MILLION], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 60
    assert kilobytes < 100_000  # 10 MB of it are the test's own


@pytest.mark.parametrize("length", [1, 2, 7, 1000, 65_536, 65_537, 100_003])
def test_a_permutation_holds_every_number_once_and_knows_its_place(length):
    order = Permutation(length, 12345)
    values = order.at(np.arange(length))
    assert np.array_equal(np.sort(values), np.arange(length))
    for place in {0, length // 2, length - 1}:
        assert order.place_of(int(values[place])) == place
    if length > 100:
        assert abs(np.corrcoef(values, np.arange(length))[0, 1]) < 0.1
        assert not np.array_equal(values, Permutation(length, 12346).at(np.arange(length)))


def test_the_memory_of_a_long_permutation_does_not_grow_with_it():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = Permutation(10**12, 1).at(np.arange(1000))
    assert len(set(values.tolist())) == 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def test_ranks_that_do_not_divide_the_batch_are_refused():
    assert [rank_slots(6, rank, 3) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(InputError, match="batch_size=6 is not divisible by 4 ranks: use 4 or 8"):
        rank_slots(6, 0, 4)


def test_a_batch_by_tokens_is_the_largest_multiple_that_fits_and_knows_no_ranks():
    assert batch_sizes_by_tokens({SMALL: 256, LARGE: 4096}, batch_tokens=66_000, multiple=8) == {SMALL: 256, LARGE: 16}
    with pytest.raises(InputError, match="bucket 4x16x8: 8 samples of 4096 tokens, more than .*: use at least 32768"):
        batch_sizes_by_tokens({SMALL: 256, LARGE: 4096}, batch_tokens=32_000, multiple=8)


def test_buckets_are_chosen_by_name_and_a_missing_one_names_those_there():
    assert list(select_buckets(ROWS, ["4x16x8"])) == [LARGE]
    assert select_buckets(ROWS, []) == ROWS
    with pytest.raises(InputError, match="bucket 5x8x8: the cache holds 1x8x8, 2x8x16, 4x16x8"):
        select_buckets(ROWS, ["5x8x8"])
