"""What a job would do, said before it does it."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig
from preprocess.dry_run import (
    _hours,
    _Row,
    cache_to_plan,
    check_sizes,
    dry_run,
    planned_bytes,
    planned_provenance,
    shortage,
)
from preprocess.job.settled import check_settings
from preprocess.tally import Tally
from preprocess.work import find_work
from shared.cache.dataset import Cache, check_has_clips
from shared.cache.ledger import Refusal
from shared.costs import VAE_RATES, gpu_seconds, t5_rate
from shared.errors import InputError
from shared.stores.open import open_store
from tests.shared.clips.planning import PROVENANCE, ClipOfTest, add_committed, clip, manifest_of, probes_of

CLIPS = [
    clip("a", num_frames=100),
    clip("b", captions=("one", "two")),
    clip("small", height=100, width=100),
    clip("short", num_frames=3),
    clip("broken", reason="not_a_video"),
]


def config_of(output: Path, **options: object) -> PreprocessConfig:
    return PreprocessConfig(
        **{"buckets": ("16x256x256", "4x64x64"), **options},  # type: ignore[arg-type]
        preset="demo",
        manifest="unused.csv",
        output=str(output),
    ).resolved()


def said(folder: Path, clips: Sequence[ClipOfTest], **options: object) -> dict[str, list[str]]:
    """Returns the lines of a dry run: what they are about, and what they say."""
    config = config_of(folder / "cache", **options)
    manifest = manifest_of(made.clip for made in clips)
    cache = cache_to_plan(config)
    work = find_work(config, manifest, probes_of(folder / "probes", manifest, clips), cache)
    lines = dry_run(work, config, cache.provenance).splitlines()
    return {
        parts[0]: parts[1:]
        for line in lines
        if (parts := line.split(": ") if ": " in line else line.split()) and not line.startswith("Bytes before")
    }


def test_texts_alone_need_a_cache_whose_clips_have_them(tmp_path: Path) -> None:
    config = config_of(tmp_path / "cache", only_texts=True)
    with pytest.raises(InputError, match="found no cache to add text.t5 to: encode clips into it first"):
        check_settings(config)
    Cache.open_or_create(tmp_path / "cache", planned_provenance(replace(config, only_texts=False)))
    check_has_clips(open_store(tmp_path / "cache"), config.streams())


def test_a_dry_run_of_texts_alone_needs_no_probes(tmp_path: Path) -> None:
    config = config_of(tmp_path / "cache", only_texts=True)
    cache = cache_to_plan(config)
    work = find_work(config, manifest_of(made.clip for made in CLIPS), None, cache)
    assert "Nothing to encode." in dry_run(work, config, cache.provenance)


def test_the_table_counts_clips_samples_shards_bytes_and_hours(tmp_path: Path) -> None:
    lines = said(tmp_path, CLIPS, windows_per_clip=3, flip=True, latent_codec="float32", text_codec="float32")
    channels = planned_provenance(config_of(tmp_path))["text.t5"]["text_channels"]
    assert not (tmp_path / "cache").exists()
    text = 120 * channels * 4
    large, small = lines["16x256x256"], lines["4x64x64"]
    geometry = planned_provenance(config_of(tmp_path))["latent"]
    stride = geometry["spatial_stride"]
    latent = 4 * geometry["latent_channels"] * 16 * (256 // stride) ** 2
    assert large[:4] == ["2", "8", "8", f"{8 * latent + 10 * text:,}"]
    assert small[:3] == ["1", "6", "6"]
    seconds = gpu_seconds(8 * 16 * 256 * 256, VAE_RATES["sd"]) + gpu_seconds(10 * 120, t5_rate(channels))
    assert large[4] == f"{seconds / 3600:.3f}"
    assert lines["all"][:2] == ["14", "14"]
    assert lines["Refused, too_short"][0] == "1, e.g. short"
    assert lines["Refused, not_a_video"][0] == "1, e.g. broken"
    assert lines["Samples already in the cache"] == ["0"]


def test_what_is_in_the_cache_is_not_counted_and_the_cache_knows_its_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open_or_create(tmp_path / "cache", PROVENANCE)
    config = config_of(tmp_path / "cache")
    manifest = manifest_of(made.clip for made in CLIPS)
    work = find_work(config, manifest, probes_of(tmp_path / "first", manifest, CLIPS), cache)
    add_committed(cache, list(work.shards)[:1])
    monkeypatch.setattr("preprocess.dry_run.planned_provenance", lambda _: pytest.fail("a model was looked at"))
    lines = said(tmp_path, CLIPS)
    assert "16x256x256" not in lines
    assert lines["Samples already in the cache"] == ["2"]
    assert lines["4x64x64"][4:] == ["not", "measured"]


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    assert said(tmp_path, [CLIPS[-1]])["Nothing"] == ["to", "encode."]


def test_what_was_refused_before_there_was_a_plan_is_said_with_an_example(tmp_path: Path) -> None:
    config = config_of(tmp_path / "cache")
    manifest = manifest_of(made.clip for made in CLIPS)
    cache = cache_to_plan(config)
    work = find_work(config, manifest, probes_of(tmp_path / "probes", manifest, CLIPS), cache)
    tally = Tally()
    tally.refuse(Refusal(source=f"{name}.mp4", reason="missing", detail=f"no file {name}.mp4") for name in "xy")
    tally.leave("throttled", example="z.mp4: the store is busy")
    needed = planned_bytes(work, config, cache.provenance)
    lines = dry_run(work, config, cache.provenance, tally, num_gpus=8, free_bytes=needed).splitlines()
    assert f"Bytes free where the cache lies: {needed:,}" in lines
    assert sum(int(row.split()[4].replace(",", "")) for row in lines[1:3]) == needed
    assert lines[lines.index("Refused, missing: 2, e.g. x.mp4: no file x.mp4") :] == [
        "Refused, missing: 2, e.g. x.mp4: no file x.mp4",
        "Refused, too_short: 1, e.g. short: 3 frames: bucket 4x64x64 takes 4",
        "Refused, not_a_video: 1, e.g. broken: because",
        "Not looked at, throttled: 1, e.g. z.mp4: the store is busy",
    ]
    assert sum("Hours of one H200; the cluster has 8 GPUs: 0." in line for line in lines) == 1


def test_hours_on_the_clusters_gpus_are_told_for_those_that_a_job_takes(tmp_path: Path) -> None:
    def told(**options: object) -> str:
        config = config_of(tmp_path / "cache", **options)
        return _hours([_Row("4x64x64", 1, 1, 1, 1, 10.0)], config, 8)

    assert told().endswith("the cluster has 8 GPUs: 1.250 hours on all, if they are such.")
    assert told(workers=4, gpus_per_worker=0.5).endswith("8 GPUs: 5.000 hours on 2 of them, if they are such.")
    assert told(workers=3, text_gpus=1).endswith("8 GPUs: 2.500 hours on 4 of them, if they are such.")
    assert told(workers=99).endswith("1.250 hours on all, if they are such.")
    assert told(device="cpu").endswith("Hours of one H200; the cluster has 8 GPUs.")
    unknown = _Row("8x64x64", 1, 1, 1, 1, None)
    assert _hours([unknown], config_of(tmp_path / "cache"), 8) == "Hours of one H200; the cluster has 8 GPUs."


def test_a_disk_that_may_be_too_small_is_told() -> None:
    assert shortage(1000, 1000, "/cache") is None
    assert shortage(1000, None, "s3://bucket/cache") is None
    told = shortage(153_000, 999, "/cache")
    assert told is not None
    assert told.startswith("note: up to 153,000 bytes may be written, and /cache has 999 free: make room there")


def test_shared_texts_are_counted_once(tmp_path: Path) -> None:
    clips = [clip("a", captions=("same",)), clip("b", captions=("same", "other"))]
    lines = said(tmp_path, clips, share_text=True, cleaning="none", text_codec="float32")
    channels = planned_provenance(config_of(tmp_path))["text.t5"]["text_channels"]
    assert lines["shared"][:4] == ["texts", "2", "1", f"{2 * 120 * channels * 4:,}"]


def test_sizes_that_do_not_fit_are_told_by_what_this_machine_knows_of_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uneven = {"buckets": ("17x513x513",)}
    with pytest.raises(InputError, match="bucket 17x513x513: height=513 is not divisible by .* of 8: use 512 or 520"):
        check_sizes(config_of(tmp_path / "none", **uneven))
    elsewhere = replace(config_of(tmp_path / "none", **uneven), preset=None, vae="/on/workers/vae")
    check_sizes(elsewhere)  # its workers may have the model
    Cache.open_or_create(tmp_path / "cache", PROVENANCE)
    monkeypatch.setattr("preprocess.dry_run.planned_provenance", lambda _: pytest.fail("a model was looked at"))
    with pytest.raises(InputError, match="height=513 is not divisible"):
        check_sizes(replace(elsewhere, output=str(tmp_path / "cache")))
    with pytest.raises(InputError, match="--shard-samples 100000: shards of bucket 16x256x256 would exceed 1 GB"):
        check_sizes(config_of(tmp_path / "cache", shard_samples=100_000))
    check_sizes(replace(elsewhere, output=str(tmp_path / "cache"), only_texts=True))


def test_mistakes_are_told_before_a_cluster_is_joined(clips_folder: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips_folder / "towers_teal.mp4", tmp_path / name)
    for size, complaint in (
        ("17x513x513", "bucket 17x513x513: height=513 is not divisible by the VAE's spatial stride of 8: use 512"),
        (
            "16x64x64",
            f"manifest {tmp_path}: none of its 2 rows can be used: 2 no_caption, e.g. a.mp4: row 1 has no text: "
            "expected the path of a clip and a text in each, in a folder a .txt beside each clip",
        ),
    ):
        told = subprocess.run(
            [
                *(sys.executable, "-m", "preprocess", "--preset", "demo", "--manifest", str(tmp_path)),
                *("--output", str(tmp_path / "cache"), "--buckets", size, "--dry-run", "--address", "127.0.0.1:1"),
            ],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.returncode == 2
        assert told.stderr.startswith(f"error: {complaint}")
        assert told.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_a_bucket_that_the_autoencoder_does_not_take_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="height=250 is not divisible by the VAE's spatial stride"):
        said(tmp_path, CLIPS, buckets=("16x250x256",))
