"""Reading from an object store: one request a run, ahead of the steps, with copies on a local disk."""

import secrets
import time
from collections.abc import Iterator

import pytest
import torch

from shared.cache.dataset import Cache
from shared.errors import InputError
from shared.spec import Bucket
from tests.s3 import MotoS3, S3Server, s3_environment
from tests.shared.stores.proxy import Proxy, running_proxy
from tests.train.synthetic_cache import write_cache
from train.data import Batch
from train.loader import load_batches
from train.local_copies import LocalCopies
from train.plan import BatchPlan
from train.rank_batches import LoaderJob
from train.sample_index import SampleIndex

LATENCY_SECONDS = 0.03
SIZES = {Bucket(4, 64, 64): 40}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with MotoS3() as running:
        yield running


@pytest.fixture
def proxy(server: S3Server, monkeypatch, tmp_path) -> Iterator[Proxy]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with running_proxy(server.endpoint) as running:
        for name, value in s3_environment(running.endpoint).items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def cache(server: S3Server, proxy: Proxy) -> Cache:
    return write_cache(f"{server.url}/{secrets.token_hex(6)}", SIZES, samples_per_shard=10, captions_per_sample=2)


def loader_job(cache: Cache, copies: LocalCopies | None = None, batch_size: int = 2, **settings) -> LoaderJob:
    index = SampleIndex.open(cache, run_bytes=20_000)
    plan = BatchPlan(index.buckets, batch_sizes=dict.fromkeys(index.buckets, batch_size), seed=0)
    options = {"rank": 0, "world_size": 1, "caption_dropout": 0.0} | settings
    return LoaderJob.of_index(index, plan, seed=0, copies=copies, **options)


def batches_of(job: LoaderJob, steps: range = range(20), num_workers: int = 0) -> list[Batch]:
    return list(load_batches(job, steps, num_workers=num_workers, pin_memory=False))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.latents, theirs.latents)
        assert torch.equal(ours.captions, theirs.captions)
        assert torch.equal(ours.noise_keys, theirs.noise_keys)


def shard_requests(proxy: Proxy) -> int:
    return sum(method == "GET" and "/shards/" in path for method, path in proxy.requests)


def num_visits(job: LoaderJob, steps: int) -> int:
    (bucket,) = job.plan.buckets
    visits, walk = 0, job.plan.walk(bucket)
    for slot in range(job.plan.batch_size(bucket)):
        number = 0
        while number < steps:
            number += len(walk.visit(number, slot).rows)
            visits += 1
    return visits


def test_a_run_is_one_request(cache, proxy):
    job = loader_job(cache)
    proxy.requests.clear()
    batches_of(job)
    shards = 4
    visits = num_visits(job, 20)
    assert visits < 20  # of 40 samples
    assert visits <= shard_requests(proxy) <= visits + shards  # a run that reaches over a shard's end takes two


def test_workers_read_from_an_object_store_what_one_process_reads(cache):
    job = loader_job(cache)
    assert_same(batches_of(job, num_workers=2), batches_of(job))


def test_the_step_does_not_wait_for_requests_that_take_30_ms(cache, proxy):
    proxy.latency_seconds = LATENCY_SECONDS
    job = loader_job(cache)
    waits, since = [], 0.0
    for step, _ in enumerate(load_batches(job, range(60), num_workers=1, pin_memory=False)):
        if step > 4:
            waits.append(time.perf_counter() - since)
        time.sleep(0.08)  # the step's computation
        since = time.perf_counter()
    assert shard_requests(proxy) > 20
    assert sorted(waits)[len(waits) // 2] < 0.004
    assert sum(waits) / (len(waits) * 0.08) < 0.1  # this machine may be busy


def test_what_was_read_is_kept_and_the_next_epoch_asks_for_nothing(cache, proxy, tmp_path):
    copies = LocalCopies(folder=tmp_path / "local", limit_bytes=10**9, url=cache.url)
    job = loader_job(cache, copies)
    plain = batches_of(loader_job(cache), range(60))
    assert_same(batches_of(job, range(20)), plain[:20])
    proxy.requests.clear()
    assert_same(batches_of(job, range(20, 60)), plain[20:])  # other captions are chosen
    assert shard_requests(proxy) == 0
    assert_same(batches_of(job, range(20), num_workers=2), plain[:20])
    assert shard_requests(proxy) == 0


def test_copies_take_no_more_than_they_may(cache, tmp_path):
    copies = LocalCopies(folder=tmp_path / "local", limit_bytes=100_000, url=cache.url)
    job = loader_job(cache, copies)
    assert_same(batches_of(job), batches_of(loader_job(cache)))
    kept = [path for path in (tmp_path / "local").rglob("*") if path.suffix == ".part"]
    assert 0 < sum(path.stat().st_size for path in kept) <= 100_000
    assert not list((tmp_path / "local").rglob(".tmp-*"))


def test_a_copy_that_was_damaged_is_read_again_from_the_store(cache, proxy, tmp_path):
    copies = LocalCopies(folder=tmp_path / "local", limit_bytes=10**9, url=cache.url)
    job = loader_job(cache, copies)
    expected = batches_of(job)
    (kept, *_, cut) = sorted((tmp_path / "local").rglob("*.part"))
    kept.write_bytes(bytes(kept.stat().st_size))
    cut.write_bytes(b"short")
    proxy.requests.clear()
    assert_same(batches_of(job), expected)
    assert shard_requests(proxy) > 0


def test_a_damaged_or_missing_shard_in_an_object_store_is_named_or_skipped(cache, server):
    rows = cache.read_index().to_pylist()
    entry = rows[0]["latent"]
    bucket, _, prefix = cache.url.removeprefix("s3://").partition("/")
    key = f"{prefix}/{entry['shard']}"
    data = bytearray(server.client().get_object(Bucket=bucket, Key=key)["Body"].read())
    data[entry["offset"] + 3] ^= 0xFF
    server.client().put_object(Bucket=bucket, Key=key, Body=bytes(data))
    with pytest.raises(InputError, match=f"{entry['shard']}, offset {entry['offset']}: found CRC32C .* corrupt"):
        batches_of(loader_job(cache))
    assert sum(batch.num_skipped for batch in batches_of(loader_job(cache, on_corrupt="skip"))) == 1
    server.client().delete_object(Bucket=bucket, Key=key)
    with pytest.raises(InputError, match=f"{entry['shard']}, offset .*: the shard is missing"):
        batches_of(loader_job(cache))
    assert sum(batch.num_skipped for batch in batches_of(loader_job(cache, on_corrupt="skip"))) == 10
