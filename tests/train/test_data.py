"""From a cache to batches: the same for any number of ranks, workers and starts."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from shared.cache.dataset import Cache
from shared.cache.reader import StreamReader
from shared.errors import InputError
from shared.spec import Bucket
from tests.train.synthetic_cache import provenance, write_cache
from train.data import Batch, RankBatches, SampleIndex, load_batches, pad_captions
from train.plan import BatchPlan, rank_slice

STEPS = 9


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    samples = {Bucket(2, 32, 32): 7, Bucket(3, 32, 48): 6}
    return write_cache(tmp_path_factory.mktemp("data") / "cache", samples, captions_per_sample=3)


def batches_of(cache, *, rank=0, world_size=1, num_workers=0, first=0, seed=5) -> list[Batch]:
    index = SampleIndex(cache)
    batches = RankBatches(
        index,
        BatchPlan(index.rows_by_bucket, batch_size=4, seed=seed),
        part=rank_slice(4, rank, world_size),
        seed=seed,
        num_levels=1000,
        caption_dropout=0.3,
    )
    return list(load_batches(batches, range(first, STEPS), num_workers=num_workers, pin_memory=False))


def assert_same(found: Batch, expected: Batch) -> None:
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name


def test_worker_processes_give_the_batches_of_the_main_process(cache):
    for found, expected in zip(batches_of(cache, num_workers=2), batches_of(cache), strict=True):
        assert_same(found, expected)


def test_a_run_that_resumes_gets_the_batches_that_it_would_have_got(cache):
    for found, expected in zip(batches_of(cache, first=4, num_workers=1), batches_of(cache)[4:], strict=True):
        assert_same(found, expected)


def test_ranks_together_have_the_batch_of_one_rank(cache):
    ranks = [batches_of(cache, rank=rank, world_size=2) for rank in range(2)]
    for step, whole in enumerate(batches_of(cache)):
        for name in ("latents", "levels", "noise", "drop_caption"):
            joined = torch.cat([getattr(rank[step], name) for rank in ranks])
            assert torch.equal(joined, getattr(whole, name)), name
        for part, rank in zip(whole.captions.split(2), ranks, strict=True):
            length = rank[step].captions.shape[2]
            assert torch.equal(part[:, :, :length], rank[step].captions)
            assert part[:, :, length:].count_nonzero() == 0


def test_batches_hold_what_the_cache_holds(cache):
    table, reader = cache.read_index(), StreamReader(cache.root)
    latents = [reader.latent(entry).float() for entry in table["latent"].to_pylist()]
    captions = [text for entry in table["text.t5"].to_pylist() for text in reader.text(entry)]
    seen = set()
    for batch in batches_of(cache):
        for row in range(len(batch)):
            assert any(torch.equal(batch.latents[row], latent) for latent in latents)
            valid = batch.captions[row, 0][batch.mask[row].bool()]
            matches = [i for i, c in enumerate(captions) if c.shape == valid.shape and torch.equal(c, valid)]
            assert len(matches) == 1
            seen.add(matches[0] % 3)
    assert seen == {0, 1, 2}


def test_noise_levels_and_dropout_are_drawn_anew_each_epoch_and_spread(cache):
    batches = batches_of(cache)
    levels = torch.cat([batch.levels for batch in batches])
    assert len(levels.unique()) > 30
    assert levels.float().mean().item() == pytest.approx(500, abs=170)
    assert 0 < torch.cat([batch.drop_caption for batch in batches]).float().mean() < 0.7
    noise = torch.cat([batch.noise.flatten() for batch in batches])
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    other = torch.cat([batch.levels for batch in batches_of(cache, seed=6)])
    assert not torch.equal(levels, other)


def test_captions_are_padded_to_few_lengths_and_never_beyond_the_limit():
    captions = [torch.ones(3, 2), torch.ones(17, 2)]
    padded, mask = pad_captions(captions, 120)
    assert padded.shape == (2, 32, 2)
    assert mask.sum(1).tolist() == [3, 17]
    assert torch.equal(padded, mask[..., None].expand(-1, -1, 2).float())
    assert pad_captions(captions, 20)[0].shape == (2, 20, 2)


def test_the_dataset_travels_to_spawned_workers(cache):
    index = SampleIndex(cache)
    plan = BatchPlan(index.rows_by_bucket, batch_size=4, seed=0)
    batches = RankBatches(index, plan, part=slice(0, 4), seed=0, num_levels=10, caption_dropout=0.0)
    assert_same(pickle.loads(pickle.dumps(batches))[3], batches[3])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_payload_is_one_line_that_names_shard_and_offset(tmp_path, num_workers):
    cache = write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 4})
    entry = cache.read_index()["latent"][0].as_py()
    with open(cache.root / entry["shard"], "r+b") as file:
        file.seek(entry["offset"] + 5)
        file.write(b"\xff\x00")
    with pytest.raises(InputError) as caught:
        batches_of(cache, num_workers=num_workers)
    assert str(entry["offset"]) in str(caught.value)
    assert entry["shard"] in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_latents_of_other_channels_than_the_provenance_are_refused(tmp_path):
    cache = write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 2}, latent_channels=3)
    with pytest.raises(InputError, match=r"shape \(3, 2, 4, 4\), expected \(4, 2, 4, 4\)"):
        SampleIndex(cache)


def test_an_empty_cache_and_a_cache_without_text_are_refused(tmp_path):
    with pytest.raises(InputError, match="the cache holds no sample"):
        SampleIndex(Cache.open_or_create(tmp_path / "empty", provenance()))
    latent_only = {"latent": provenance()["latent"]}
    with pytest.raises(InputError, match=r"no stream 'text.t5', only latent"):
        SampleIndex(Cache.open_or_create(tmp_path / "textless", latent_only))


def test_the_frame_rate_of_a_bucket_is_its_samples_median(cache):
    assert SampleIndex(cache).fps(Bucket(2, 32, 32)) == np.float64(8.0)
