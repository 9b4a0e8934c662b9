"""From a cache to batches: the same for any number of ranks, workers and starts."""

import dataclasses

import pytest
import torch

from shared.cache.dataset import Cache
from shared.cache.reader import StreamReader
from shared.errors import InputError
from shared.spec import Bucket
from tests.train.synthetic_cache import provenance, write_cache
from train.data import Batch
from train.index_columns import IMAGE_FPS, IndexFolder
from train.loader import load_batches
from train.plan import BatchPlan
from train.rank_batches import LoaderJob
from train.sample_index import SampleIndex
from train.step_samples import padded_length

STEPS = 9
SIZES = {Bucket(2, 32, 32): 17, Bucket(3, 32, 48): 14}
RUN_BYTES = 3000  # a few samples


@pytest.fixture(autouse=True)
def index_in_the_tests_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("data") / "cache", SIZES, captions_per_sample=3, samples_per_shard=5)


def loader_job(
    cache: Cache, *, rank=0, world_size=1, seed=5, batch_size=4, run_bytes=RUN_BYTES, **settings
) -> LoaderJob:
    index = SampleIndex.open(cache, run_bytes=run_bytes)
    plan = BatchPlan(index.buckets, batch_sizes=dict.fromkeys(index.buckets, batch_size), seed=seed)
    settings = {"caption_dropout": 0.3} | settings
    return LoaderJob.of_index(index, plan, rank=rank, world_size=world_size, seed=seed, **settings)


def batches_of(cache: Cache, *, num_workers=0, first=0, steps=STEPS, **settings) -> list[Batch]:
    job = loader_job(cache, **settings)
    return list(load_batches(job, range(first, steps), num_workers=num_workers, pin_memory=False))


def assert_same(found: Batch, expected: Batch) -> None:
    for field in dataclasses.fields(Batch):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, field.name


def joined(parts: list[Batch]) -> Batch:
    names = [f.name for f in dataclasses.fields(Batch) if isinstance(getattr(parts[0], f.name), torch.Tensor)]
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return dataclasses.replace(parts[0], **tensors, num_skipped=sum(part.num_skipped for part in parts))


def stored(cache: Cache) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Returns the latents and the captions as the plain reader reads them, by sample."""
    rows, reader = cache.read_index().to_pylist(), StreamReader(cache.store)
    latents = [reader.latent(row["latent"]) for row in rows]
    return latents, [
        [reader.text(place, row["text.t5"]["channels"]) for place in row["text.t5"]["captions"]] for row in rows
    ]


def flip_byte(cache: Cache, entry: dict) -> None:
    path = cache.store.local_path(entry["shard"])
    with open(path, "r+b") as file:
        file.seek(entry["offset"] + 5)
        byte = file.read(1)
        file.seek(entry["offset"] + 5)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_any_number_of_workers_gives_the_same_batches(cache):
    expected = batches_of(cache)
    for num_workers in (1, 3):
        for found, same in zip(batches_of(cache, num_workers=num_workers), expected, strict=True):
            assert_same(found, same)


def test_ranks_together_have_the_batch_of_one_rank_bit_by_bit(cache):
    whole = batches_of(cache)
    for world_size in (2, 4):
        ranks = [batches_of(cache, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, expected in enumerate(whole):
            assert_same(joined([rank[step] for rank in ranks]), expected)


def test_a_run_that_resumes_on_other_ranks_and_workers_gets_the_batches_that_it_would_have_got(cache):
    whole = batches_of(cache)
    ranks = [batches_of(cache, rank=rank, world_size=2, first=4, num_workers=1) for rank in range(2)]
    for step, expected in enumerate(whole[4:]):
        assert_same(joined([rank[step] for rank in ranks]), expected)


def test_batches_hold_every_sample_once_an_epoch_with_one_of_its_captions(cache):
    latents, captions = stored(cache)
    seen: list[int] = []
    chosen = set()
    for batch in batches_of(cache, steps=31):  # 4 epochs of 17 and 14 samples end on a batch of 4
        for row in range(len(batch)):
            (sample,) = [i for i, latent in enumerate(latents) if torch.equal(batch.latents[row], latent)]
            valid = batch.captions[row, 0][batch.mask[row].bool()]
            matches = [k for k, c in enumerate(captions[sample]) if c.shape == valid.shape and torch.equal(c, valid)]
            assert len(matches) == 1
            assert batch.captions[row, 0][len(valid) :].count_nonzero() == 0
            seen.append(sample)
            chosen.add(matches[0])
    assert chosen == {0, 1, 2}
    assert sorted(seen) == sorted([*range(len(latents))] * 4)


def test_batches_tell_rate_and_size_of_each_sample_and_which_it_is(tmp_path):
    sizes = {Bucket(1, 32, 32): 3, Bucket(2, 32, 48): 8}
    cache = write_cache(tmp_path / "cache", sizes, fps=(6.0, 12.5, 24.0))
    rates = {row["sample"]: row["fps"] for row in cache.read_index().to_pylist()}
    seen = set()
    for batch in batches_of(cache, num_workers=1, steps=12):
        is_image = batch.latents.shape[2] == 1
        assert batch.height.tolist() == [32.0] * 4
        assert batch.width.tolist() == [32.0 if is_image else 48.0] * 4
        assert batch.fps.tolist() == [IMAGE_FPS if is_image else rates[sample] for sample in batch.samples]
        seen |= set(batch.samples)
    assert seen == set(rates)


def test_caches_that_differ_in_their_codecs_give_the_same_samples_in_the_same_order(tmp_path):
    plain, small = (
        batches_of(write_cache(tmp_path / codec, SIZES, codecs=(codec, codec))) for codec in ("float32", "int8@30+zstd")
    )
    assert [batch.samples for batch in plain] == [batch.samples for batch in small]
    for found, expected in zip(small, plain, strict=True):
        torch.testing.assert_close(found.latents.float(), expected.latents, rtol=0.0, atol=0.2)


@pytest.mark.parametrize("container", ["tar", "zarr"])
@pytest.mark.parametrize(
    "codecs",
    [
        ("float32", "float32"),
        ("bfloat16+zstd", "bfloat16+zstd"),
        ("float16", "float16"),
        ("float16+zstd", "bfloat16"),
        ("float32+zstd", "int8@30"),
        ("int8@37+delta+zstd", "int8@30+zstd"),
        ("int8@37", "float32+zstd"),
    ],
)
def test_every_codec_in_either_container_is_delivered_as_it_is_stored(tmp_path, codecs, container):
    cache = write_cache(tmp_path / "c", {Bucket(4, 32, 32): 6}, codecs=codecs, container=container)
    latents, captions = stored(cache)
    types = [torch.float32 if codec.startswith("float32") else torch.bfloat16 for codec in codecs]
    rows = [
        row
        for batch in batches_of(cache, steps=3, batch_size=2)
        for row in zip(batch.latents, batch.captions, batch.mask, strict=True)
    ]
    assert len(rows) == 6
    for latent, caption, mask in rows:
        assert (latent.dtype, caption.dtype) == tuple(types)
        (sample,) = [i for i, other in enumerate(latents) if torch.equal(latent, other.to(types[0]))]
        assert torch.equal(caption[0][mask.bool()], captions[sample][0].to(types[1]))


def test_texts_that_lie_in_other_shards_are_found(tmp_path):
    cache = write_cache(tmp_path / "c", SIZES, captions_per_sample=2, new_texts=True, samples_per_shard=4)
    latents, captions = stored(cache)
    for batch in batches_of(cache):
        for row in range(len(batch)):
            (sample,) = [i for i, latent in enumerate(latents) if torch.equal(batch.latents[row], latent)]
            valid = batch.captions[row, 0][batch.mask[row].bool()]
            assert any(torch.equal(valid, caption) for caption in captions[sample] if len(caption) == len(valid))


def test_moments_are_sampled_anew_each_epoch_and_alike_on_any_number_of_ranks(tmp_path):
    cache = write_cache(tmp_path / "c", {Bucket(2, 32, 32): 4}, posterior="mean+logvar", latent_channels=8)
    epochs = batches_of(cache, steps=2)
    (moments, _), latents = stored(cache), [batch.clean_latents() for batch in epochs]
    assert latents[0].shape == (4, 4, 2, 4, 4)
    drawn: dict[int, list[torch.Tensor]] = {}
    for batch, sampled in zip(epochs, latents, strict=True):
        assert batch.noise().shape == sampled.shape
        for row, found in zip(batch.latents, sampled, strict=True):
            (sample,) = [i for i, other in enumerate(moments) if torch.equal(row, other)]
            mean, logvar = moments[sample].float().chunk(2)
            drawn.setdefault(sample, []).append((found - mean) / torch.exp(0.5 * logvar))
    noise = torch.stack([torch.stack(pair) for pair in drawn.values()])  # (samples, epochs, ...)
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert abs(torch.corrcoef(torch.stack([noise[:, 0].flatten(), noise[:, 1].flatten()]))[0, 1]) < 0.15
    own = torch.cat([batch.noise() for batch in epochs])
    assert abs(torch.corrcoef(torch.stack([own.flatten(), torch.cat(latents).flatten()]))[0, 1]) < 0.15
    halves = [batches_of(cache, steps=2, rank=rank, world_size=2) for rank in range(2)]
    for step, whole in enumerate(latents):
        assert torch.equal(torch.cat([half[step].clean_latents() for half in halves]), whole)


def test_draws_for_noise_levels_and_dropout_are_drawn_anew_each_epoch_and_spread(cache):
    batches = batches_of(cache, steps=40)
    u = torch.cat([batch.u for batch in batches])
    assert len(u.unique()) > 120
    assert u.dtype is torch.float64
    assert u.mean().item() == pytest.approx(0.5, abs=0.1)
    assert 0.15 < torch.cat([batch.drop_caption for batch in batches]).float().mean() < 0.45
    noise = torch.cat([batch.noise().flatten() for batch in batches[:10]])
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    other = torch.cat([batch.u for batch in batches_of(cache, steps=40, seed=6)])
    assert not torch.equal(u, other)
    keys = torch.cat([batch.noise_keys for batch in batches])
    assert len(keys.unique()) == len(keys)


def test_captions_are_padded_to_few_lengths_and_never_beyond_the_limit():
    assert [padded_length(longest, 120) for longest in (1, 16, 17, 113, 120)] == [16, 16, 32, 120, 120]


def test_batches_that_are_kept_stay_as_they_were(cache):
    job = loader_job(cache)
    kept = list(load_batches(job, range(STEPS), num_workers=1, pin_memory=False))
    for step, batch in enumerate(load_batches(job, range(STEPS), num_workers=1, pin_memory=False)):
        assert_same(kept[step], batch)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_payload_is_one_line_that_names_shard_and_offset(tmp_path, num_workers):
    cache = write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 4})
    entry = cache.read_index()["latent"][0].as_py()
    flip_byte(cache, entry)
    with pytest.raises(
        InputError, match=f"{entry['shard']}, offset {entry['offset']}: found CRC32C .* corrupt"
    ) as caught:
        batches_of(cache, num_workers=num_workers)
    assert "Traceback" not in str(caught.value)


def test_a_shard_that_is_missing_or_cut_short_is_named(tmp_path):
    cache = write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 4})
    entry = cache.read_index()["latent"][3].as_py()
    path = cache.store.local_path(entry["shard"])
    with open(path, "r+b") as file:
        file.truncate(entry["offset"] + 10)
    with pytest.raises(
        InputError, match=f"{entry['shard']}, offset .*: found 10 bytes, expected .*: the shard is cut short"
    ):
        batches_of(cache)
    path.unlink()
    with pytest.raises(InputError, match=f"{entry['shard']}, offset .*: the shard is missing"):
        batches_of(cache)


def test_skipped_samples_are_counted_and_replaced_alike_on_any_number_of_ranks(tmp_path):
    cache = write_cache(tmp_path / "cache", SIZES, captions_per_sample=2, samples_per_shard=5)
    latents, _ = stored(cache)
    rows = cache.read_index().to_pylist()
    in_first = [row for row in rows if row["num_frames"] == 2]
    flip_byte(cache, in_first[0]["latent"])
    flip_byte(cache, in_first[1]["latent"])
    damaged = [
        latents[i] for i, row in enumerate(rows) if row["sample"] in (in_first[0]["sample"], in_first[1]["sample"])
    ]
    whole = batches_of(cache, steps=31, on_corrupt="skip")
    assert sum(batch.num_skipped for batch in whole) == 2 * 4  # epochs
    for batch in whole:
        assert len(batch) == 4
        assert not any(torch.equal(row, latent) for row in batch.latents for latent in damaged)
        assert any(torch.equal(batch.latents[0], latent) for latent in latents)
    ranks = [batches_of(cache, steps=31, rank=r, world_size=2, on_corrupt="skip", num_workers=r) for r in range(2)]
    for step, expected in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        found = joined([dataclasses.replace(p, captions=padded(p.captions, 2), mask=padded(p.mask, 1)) for p in parts])
        assert_same(
            found, dataclasses.replace(expected, captions=padded(expected.captions, 2), mask=padded(expected.mask, 1))
        )


def padded(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    missing = 16 - tensor.shape[axis]
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - axis) + (0, missing))


def test_a_longer_caption_of_a_replacing_sample_is_not_cut(tmp_path, monkeypatch):
    cache = write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 8}, samples_per_shard=8)
    job = dataclasses.replace(loader_job(cache, on_corrupt="skip", batch_size=1), max_tokens=40)
    columns = job.index.columns()
    tokens = columns.num_tokens.tolist()
    row = tokens.index(min(tokens))
    shard, offset = job.shards[int(columns.latent.shard[row])], int(columns.latent.offset[row])
    flip_byte(cache, {"shard": shard, "offset": offset})
    monkeypatch.setattr("train.step_samples._CAPTION_MULTIPLE", 1)
    batches = list(load_batches(job, range(8), num_workers=0, pin_memory=False))
    (skipped,) = [batch for batch in batches if batch.num_skipped]
    assert int(skipped.mask.sum()) == tokens[(row + 1) % 8] > tokens[row]
    assert skipped.captions.shape[2] == skipped.mask.shape[1] == tokens[(row + 1) % 8]


def test_a_missing_shard_can_be_skipped_and_a_bucket_without_any_good_sample_cannot(tmp_path):
    cache = write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 8}, samples_per_shard=4)
    shards = sorted({entry["shard"] for entry in cache.read_index()["latent"].to_pylist()})
    cache.store.local_path(shards[0]).unlink()
    assert sum(batch.num_skipped for batch in batches_of(cache, steps=2, on_corrupt="skip")) == 4
    cache.store.local_path(shards[1]).unlink()
    with pytest.raises(InputError, match="bucket 2x32x32: none of its samples can be read: .*the shard is missing"):
        batches_of(cache, steps=2, on_corrupt="skip")


def test_a_worker_that_is_killed_is_told_and_nothing_hangs(cache):
    import multiprocessing

    batches = load_batches(loader_job(cache), range(1000), num_workers=1, pin_memory=False)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(InputError, match="a loader process was killed .*: use fewer --num-workers"):
        for _ in batches:
            pass


def test_a_defect_in_a_loader_process_is_told_with_its_error(cache):
    broken = dataclasses.replace(loader_job(cache), caption_dropout=None)
    with pytest.raises(RuntimeError, match="a loader process failed: TypeError: .*NoneType"):
        next(load_batches(broken, range(9), num_workers=1, pin_memory=False))


def test_memory_that_runs_out_in_a_loader_process_is_told_as_such(cache):
    too_large = dataclasses.replace(loader_job(cache), caption_dropout=TooLarge())
    with pytest.raises(MemoryError, match="a loader process failed: MemoryError: 17 GiB"):
        next(load_batches(too_large, range(9), num_workers=1, pin_memory=False))


class TooLarge:
    """A number with which nothing can be compared for want of memory."""

    __array_ufunc__ = None

    def __gt__(self, other):
        raise MemoryError("17 GiB")


def test_latents_of_other_channels_than_the_provenance_are_refused(tmp_path):
    cache = write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 2}, latent_channels=3)
    with pytest.raises(InputError, match=r"shape \(3, 2, 4, 4\), expected \(4, 2, 4, 4\)"):
        SampleIndex.open(cache)


def test_an_empty_cache_and_a_cache_without_text_are_refused(tmp_path):
    with pytest.raises(InputError, match="the cache holds no sample"):
        SampleIndex.open(Cache.open_or_create(tmp_path / "empty", provenance()))
    latent_only = {"latent": provenance()["latent"]}
    with pytest.raises(InputError, match=r"no stream 'text.t5', only latent"):
        SampleIndex.open(Cache.open_or_create(tmp_path / "textless", latent_only))


def test_the_index_is_built_once_a_node_and_anew_when_samples_are_added(tmp_path, monkeypatch):
    cache = write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 3})
    built = []
    original = IndexFolder.about
    import train.sample_index as sample_index

    build = sample_index.build_columns
    monkeypatch.setattr(sample_index, "build_columns", lambda *args, **more: built.append(1) or build(*args, **more))
    monkeypatch.setattr(IndexFolder, "about", original)
    first = SampleIndex.open(cache)
    assert SampleIndex.open(cache).folder == first.folder
    assert len(built) == 1
    write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 2}, seed=7)
    second = SampleIndex.open(cache)
    assert (len(built), second.num_samples) == (2, 5)
    assert second.digest != first.digest
    assert not any(path.name.startswith(".") for path in second.folder.path.parent.iterdir())


def test_the_frame_rate_of_a_bucket_is_its_samples_median(cache):
    assert SampleIndex.open(cache).fps(Bucket(2, 32, 32)) == 8.0
