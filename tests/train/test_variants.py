"""Windows of a clip and mirrored ones: one an epoch, another one each time, read in runs as they are stored."""

import dataclasses
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
import torch

from shared.cache.dataset import Cache
from shared.spec import Bucket
from tests.train.synthetic_cache import write_cache
from tests.train.test_data import assert_same, flip_byte, joined
from train.bucket_walk import BucketRows, BucketWalk
from train.clip_order import clip_numbers, order_by_variant
from train.data import Batch
from train.index_columns import IndexColumns
from train.loader import load_batches
from train.plan import BatchPlan
from train.rank_batches import LoaderJob
from train.run_reader import FolderReader
from train.sample_index import SampleIndex, Selection
from train.variants import ClipGroup

SMALL, LARGE = Bucket(2, 32, 32), Bucket(3, 32, 48)
ALL = [(0, False), (1, False), (0, True), (1, True)]
VIEWS = [ALL, ALL, ALL, ALL, ALL, [(0, False)], [(0, False), (0, True)]]
"""A clip in seven is short, one lacks its second window."""
CLIPS = {SMALL: 21, LARGE: 14}
RUN_BYTES = 3000  # a few samples


def grouped(*groups: tuple[int, int], run_samples: int = 3, first_row: int = 0) -> BucketRows:
    """Returns rows of clips: pairs of their number and of how many variants they have."""
    return BucketRows(
        first_row=first_row,
        num_samples=sum(clips for clips, _ in groups),
        run_samples=run_samples,
        groups=tuple(ClipGroup(num_clips=clips, num_variants=variants) for clips, variants in groups),
    )


def clip_and_variant(rows: BucketRows) -> dict[int, tuple[int, int]]:
    """Returns of each row its clip and which of the clip's variants it is."""
    found, row, clip = {}, rows.first_row, 0
    for group in rows.groups:
        for variant in range(group.num_variants):
            for place in range(group.num_clips):
                found[row] = clip + place, variant
                row += 1
        clip += group.num_clips
    return found


def test_each_clip_is_taken_once_an_epoch_and_each_of_its_variants_equally_often():
    rows = {
        SMALL: grouped((17, 4), (5, 3), (11, 1)),
        LARGE: dataclasses.replace(grouped((8, 2)), first_row=17 * 4 + 5 * 3 + 11),
    }
    plan = BatchPlan(rows, batch_sizes={SMALL: 4, LARGE: 6}, seed=3)
    assert plan.num_samples == 33 + 8
    names = {row: (bucket, *at) for bucket, some in rows.items() for row, at in clip_and_variant(some).items()}
    clips, variants = Counter(), defaultdict(Counter)
    for step in range(plan.first_step(12)):
        batch = plan.batch(step)
        for row, epoch in zip(batch.rows.tolist(), batch.epochs.tolist(), strict=True):
            bucket, clip, variant = names[row]
            clips[bucket, clip, epoch] += 1
            variants[bucket, clip][variant] += 1
    assert len(clips) == 12 * (33 + 8)
    assert set(clips.values()) == {1}
    numbers = {(SMALL, clip): 4 if clip < 17 else 3 if clip < 22 else 1 for clip in range(33)}
    numbers |= {(LARGE, clip): 2 for clip in range(8)}
    assert variants == {clip: Counter(dict.fromkeys(range(n), 12 // n)) for clip, n in numbers.items()}


def test_the_clips_of_a_run_take_the_same_variant_so_that_their_rows_are_neighbours():
    rows = grouped((40, 3), (40, 2), run_samples=8, first_row=7)
    walk = BucketWalk(rows, batch_size=3, key=5)
    for epoch in range(6):
        for run in range(10):
            taken = walk.run_rows(run, epoch)
            assert np.diff(taken).tolist() == [1] * 7
            assert {clip_and_variant(rows)[row][0] // 8 for row in taken.tolist()} == {run}


def test_runs_choose_by_themselves_and_in_another_order_each_time_around():
    walk = BucketWalk(grouped((800, 4), run_samples=4), batch_size=1, key=1)
    chosen = np.array([[walk.run_rows(run, epoch)[0] // 800 for epoch in range(24)] for run in range(200)])
    for epoch in range(24):
        assert (np.abs(np.bincount(chosen[:, epoch], minlength=4) - 50) < 30).all()
    rounds = chosen.reshape(200, 6, 4)
    assert (np.sort(rounds, axis=2) == np.arange(4)).all()
    assert len({tuple(order) for order in rounds.reshape(-1, 4).tolist()}) == 24
    assert sum(len({tuple(order) for order in run}) > 1 for run in rounds.tolist()) > 190
    other = BucketWalk(grouped((800, 4), run_samples=4), batch_size=1, key=2)
    assert [other.run_rows(run, 0)[0] // 800 for run in range(200)] != chosen[:, 0].tolist()


def test_a_visit_a_take_and_a_run_agree_on_the_rows():
    rows = grouped((30, 4), (22, 2), (9, 1), run_samples=8)
    walk = BucketWalk(rows, batch_size=5, key=9)
    for slot in range(5):
        number = 0
        while number < 61:  # five epochs of 61 / 5 batches
            visit = walk.visit(number, slot)
            assert set(visit.rows) <= set(walk.run_rows(visit.run, visit.epoch).tolist())
            for offset, row in enumerate(visit.rows):
                taken, epochs = walk.take(number + offset, slice(slot, slot + 1))
                assert (taken.tolist(), epochs.tolist()) == ([row], [visit.epoch])
            number += len(visit.rows)


def test_rows_are_put_where_the_arithmetic_finds_them_whatever_the_order_of_the_index():
    generator = np.random.default_rng(4)
    samples = []  # bucket, clip, shard, offset
    for bucket in (3, 9):
        shards = generator.permutation(100).tolist()
        for clip in range(60):
            for variant in range([4, 4, 4, 1, 2][clip % 5]):
                samples.append((bucket, 7919 * clip + bucket // 9, shards[variant * 3 + clip // 25], clip))
    columns = np.array(samples)[generator.permutation(len(samples))].T
    order, groups = order_by_variant(*columns)
    assert sorted(order.tolist()) == list(range(len(samples)))
    assert groups == {
        bucket: [ClipGroup(num_clips=n, num_variants=k) for n, k in ((36, 4), (12, 2), (12, 1))] for bucket in (3, 9)
    }
    bucket, clip, shard, offset = columns[:, order]
    for first, number in ((0, 3), (len(order) // 2, 9)):
        rows = grouped((36, 4), (12, 2), (12, 1), first_row=first)
        clips: dict[int, set[int]] = defaultdict(set)
        shards_of: dict[int, list[int]] = defaultdict(list)
        for row, (place, _) in clip_and_variant(rows).items():
            assert bucket[row] == number
            clips[place].add(int(clip[row]))
            shards_of[place].append(int(shard[row]))
        assert all(len(same) == 1 for same in clips.values())
        assert all(held == sorted(held) for held in shards_of.values())
        leading = [(shard[row], offset[row]) for row in range(first, first + 36)]
        assert leading == sorted(leading)


def test_only_window_and_flip_make_variants_of_a_clip():
    row = {"source": "a", "source_version": "1", "frame_interval": 1, "sampling_fps": None, "start": None, "end": None}
    others = [
        *({"source": "b"}, {"source_version": "2"}, {"frame_interval": 2}, {"sampling_fps": 8.0}, {"start": 0.0}),
        *({"start": 0.0, "end": 4.0}, {"end": 4.0}),
    ]
    rows = [row | {"window": None, "flip": None}, row | {"window": 0, "flip": False}, row | {"window": 9, "flip": True}]
    rows += [row | {"window": 9, "flip": False} | other for other in others]
    kinds = {"sampling_fps": pa.float64(), "start": pa.float64(), "end": pa.float64(), "window": pa.int32()}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = pa.table({name: pa.array(values, kinds.get(name)) for name, values in columns.items()})
    numbers = clip_numbers(table).tolist()
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(set(numbers)) == 1 + len(others)
    older = table.slice(0, 1).select(["source", "source_version", "frame_interval"])
    assert clip_numbers(older).tolist() == numbers[:1]


@pytest.fixture(autouse=True)
def index_in_the_tests_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    root = tmp_path_factory.mktemp("views") / "cache"
    return write_cache(root, CLIPS, views=VIEWS, captions_per_sample=2, samples_per_shard=5)


def job_of(cache: Cache, *, variants="one", batch_size=4, rank=0, world_size=1, **settings) -> LoaderJob:
    index = SampleIndex.open(cache, variants=variants, run_bytes=RUN_BYTES)
    plan = BatchPlan(index.buckets, batch_sizes=dict.fromkeys(index.buckets, batch_size), seed=5)
    options = {"caption_dropout": 0.0} | settings
    return LoaderJob.of_index(index, plan, rank=rank, world_size=world_size, seed=5, **options)


def batches_of(job: LoaderJob, steps: range, num_workers: int = 0) -> list[Batch]:
    return list(load_batches(job, steps, num_workers=num_workers, pin_memory=False))


def sample_names(columns: IndexColumns) -> list[str]:
    return [f"{a:016x}{b:016x}" for a, b in columns.identity.tolist()]


def sources_of(cache: Cache) -> dict[str, tuple[str, int, bool]]:
    """Returns the clip, window and flip of each sample."""
    rows = cache.read_index().to_pylist()
    return {row["sample"]: (row["source"], row["window"], row["flip"]) for row in rows}


def planned(job: LoaderJob, epochs: int) -> dict[int, list[str]]:
    """Returns the samples that each epoch takes."""
    names, taken = sample_names(job.index.columns()), defaultdict(list)
    for step in range(job.plan.first_step(epochs)):
        batch = job.plan.batch(step)
        for row, epoch in zip(batch.rows.tolist(), batch.epochs.tolist(), strict=True):
            taken[epoch].append(names[row])
    return taken


def test_an_epoch_of_a_cache_has_one_view_of_each_clip_and_four_have_all(cache):
    job, about = job_of(cache), sources_of(cache)
    clips = {source for source, _, _ in about.values()}
    assert (len(clips), len(about)) == (35, 25 * 4 + 5 * 2 + 5)
    taken = planned(job, 4)  # 21 and 14 clips: four epochs end on a batch of four
    for epoch in range(4):
        assert sorted(about[sample][0] for sample in taken[epoch]) == sorted(clips)
    counts = Counter(sample for samples in taken.values() for sample in samples)
    views = Counter(source for source, _, _ in about.values())
    assert counts == {sample: 4 // views[source] for sample, (source, _, _) in about.items()}
    assert len({about[sample][1:] for sample in taken[0]}) > 2


def test_with_all_variants_every_sample_is_taken_every_epoch(cache):
    about = sources_of(cache)
    for samples in planned(job_of(cache, variants="all"), 4).values():
        assert sorted(samples) == sorted(about)


def test_batches_hold_the_planned_samples_on_any_ranks_and_workers_and_when_resumed(cache, monkeypatch):
    job = job_of(cache)
    latents = {row["sample"]: row["latent"] for row in cache.read_index().to_pylist()}
    whole, names = batches_of(job, range(18)), sample_names(job.index.columns())
    means = torch.tensor([latents[name]["mean"] for name in names])
    for step, batch in enumerate(whole):
        rows = job.plan.batch(step).rows
        assert torch.allclose(batch.latents.float().mean((2, 3, 4)), means[rows], atol=0.01)
    for found, expected in zip(batches_of(job, range(18), num_workers=2), whole, strict=True):
        assert_same(found, expected)
    monkeypatch.setattr(FolderReader, "reads_whole_runs", True)  # as from an object store whose reads are kept
    for found, expected in zip(batches_of(job, range(18)), whole, strict=True):
        assert_same(found, expected)
    ranks = [batches_of(job_of(cache, rank=rank, world_size=2), range(7, 18)) for rank in range(2)]
    for step, expected in enumerate(whole[7:]):
        assert_same(joined([rank[step] for rank in ranks]), expected)


def test_what_a_run_takes_lies_in_one_piece_but_where_a_shard_ends(tmp_path):
    cache = write_cache(tmp_path / "c", {SMALL: 60}, views=[ALL], samples_per_shard=20)
    job = job_of(cache)
    latent, walk = job.index.columns().latent, job.plan.walk(SMALL)
    stored = np.empty(len(latent), np.int64)
    stored[np.lexsort((latent.offset, latent.shard))] = np.arange(len(latent))
    size, pieces = walk.rows.run_samples, Counter()
    assert 1 < size < 20
    for run in range(60 // size):
        for epoch in range(4):
            rows = walk.run_rows(run, epoch)
            num_shards = len(np.unique(latent.shard[rows]))
            pieces[int((np.diff(np.sort(stored[rows])) > 1).sum()) <= num_shards - 1] += 1
            assert num_shards <= 2
    assert pieces[True] == 60 // size * 4


def test_a_damaged_sample_is_replaced_where_that_is_asked_for(tmp_path):
    cache = write_cache(tmp_path / "c", {SMALL: 6}, views=[ALL], samples_per_shard=3)
    for row in cache.read_index().to_pylist()[::3]:
        flip_byte(cache, row["latent"])
    batches = batches_of(job_of(cache, batch_size=2, on_corrupt="skip"), range(12))  # four epochs
    assert sum(batch.num_skipped for batch in batches) == 8


def test_all_variants_of_a_clip_are_on_one_side_of_the_hold_out(cache):
    about, sides = sources_of(cache), []
    for held_out_side in (False, True):
        selection = Selection(holdout="30%", held_out_side=held_out_side)
        index = SampleIndex.open(cache, selection)
        sides.append({about[name][0] for name in sample_names(index.folder.columns())})
        assert index.num_samples == len(sides[-1]) > 0
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 35


def test_a_condition_may_leave_some_variants_of_a_clip(cache):
    index = SampleIndex.open(cache, Selection(where="window > 0"))
    about = sources_of(cache)
    assert {about[name][1] > 0 for name in sample_names(index.folder.columns())} == {True}
    assert index.num_samples == 25
    assert [group.num_variants for rows in index.buckets.values() for group in rows.groups] == [2, 2]
    upright = SampleIndex.open(cache, Selection(where="not flip"))
    assert {about[name][2] for name in sample_names(upright.folder.columns())} == {False}
    assert upright.num_samples == 35


def test_samples_of_jobs_that_knew_no_windows_are_variants_too_and_not_mirrored(tmp_path):
    write_cache(tmp_path / "c", {SMALL: 5})
    cache = write_cache(tmp_path / "c", {SMALL: 5}, views=[ALL])
    (rows,) = SampleIndex.open(cache).buckets.values()
    assert rows.groups == (ClipGroup(num_clips=5, num_variants=5),)
    assert SampleIndex.open(cache, Selection(where="not flip")).buckets[SMALL].num_rows == 15


def test_a_cache_whose_clips_have_one_view_each_is_read_as_one_that_knows_no_windows(tmp_path):
    plain = write_cache(tmp_path / "plain", {SMALL: 9}, samples_per_shard=4)
    job, every = job_of(plain), job_of(plain, variants="all")
    lone = write_cache(tmp_path / "lone", {SMALL: 9}, views=[[(0, False)]], samples_per_shard=4)
    assert planned(job, 3) == planned(every, 3)
    assert planned(job_of(lone), 3) == planned(job_of(lone, variants="all"), 3)
    for cache in (plain, lone):
        assert SampleIndex.open(cache).digest == SampleIndex.open(cache, variants="all").digest


PLAN_TEN_MILLION = """
import resource, time
import numpy as np
from shared.spec import Bucket
from train.bucket_walk import BucketRows
from train.plan import BatchPlan
from train.variants import ClipGroup
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
bucket, groups = Bucket(1, 8, 8), [(2_200_000, 4), (500_000, 2), (200_000, 1)]
groups = tuple(ClipGroup(num_clips=clips, num_variants=variants) for clips, variants in groups)
rows = BucketRows(first_row=0, num_samples=2_900_000, run_samples=16, groups=groups)
assert rows.num_rows == 10**7
plan = BatchPlan({bucket: rows}, batch_sizes={bucket: 1024}, seed=0)
seen = np.zeros(10**7, dtype=np.uint8)
for step in range(4 * 2_900_000 // 1024 + 1):
    batch = plan.batch(step)
    seen[batch.rows[batch.epochs < 4]] += 1
assert (seen[: 8_800_000] == 1).all() and (seen[8_800_000 : 9_800_000] == 2).all() and (seen[9_800_000 :] == 4).all()
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_four_epochs_of_ten_million_samples_are_planned_in_seconds_and_little_memory():
    done = subprocess.run([sys.executable, "-c", PLAN_TEN_MILLION], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 90
    assert kilobytes < 100_000  # 10 MB of it are the test's own
