"""From a manifest: its captions, lengths and buckets, and how its clips compress, against a cache made of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.cache.commit import ShardWriter
from shared.cache.dataset import Cache
from shared.cache.identity import text_id
from shared.cache.layout import Container
from shared.cache.rows import Sample, Text, sample_row
from shared.codec import Codec
from shared.encoders.t5 import TextEncoder
from shared.encoders.vae import VideoAutoencoder
from shared.errors import InputError
from shared.media.clip import Window
from shared.media.manifest import read_manifest
from shared.media.probe import probe
from shared.media.refusal import MediaError
from shared.media.video import decode_window
from shared.spec import Bucket
from shared.stores.open import open_store
from shared.windows import centre_start
from storage_estimates.__main__ import main
from storage_estimates.config import EstimateConfig
from storage_estimates.estimate import Choice, estimate
from storage_estimates.from_manifest import samples_of_manifest
from storage_estimates.samples import Samples

MANIFEST = Path(__file__).parent.parent / "data" / "clips" / "clips.csv"
BUCKET = Bucket(16, 128, 128)


def config(**options: Any) -> EstimateConfig:
    """Returns options that take the demo models and the tests' own clips."""
    return EstimateConfig(manifest=str(MANIFEST), tokenizer="demo:t5", buckets=(str(BUCKET),), **options)


@pytest.fixture(scope="module")
def calibrated() -> Samples:
    return samples_of_manifest(config(calibrate=6, vae="demo:vae", text_encoder="demo:t5", device="cpu"))


@pytest.fixture(scope="module")
def encoded() -> list[Sample]:
    """What stage 1 makes of the clips."""
    vae, encoder = VideoAutoencoder.load("demo:vae"), TextEncoder.load("demo:t5")
    samples = []
    for number, clip in enumerate(read_manifest(MANIFEST).clips):
        try:
            facts = probe(clip.media)[0]
        except MediaError:
            continue
        window = Window(start=centre_start(facts.num_frames, BUCKET.num_frames), num_frames=BUCKET.num_frames)
        latent = vae.encode(decode_window(clip.media, None, window, BUCKET), seed=str(number))
        texts = zip(clip.captions, encoder.encode(list(clip.captions)), strict=True)
        samples.append(
            Sample(
                sample=text_id(clip.source),
                source=clip.source,
                source_version=facts.version,
                bucket=BUCKET,
                frame_interval=1,
                fps=float(facts.fps),
                latent=latent,
                texts={"text.t5": tuple(Text(id=text_id(c), caption=c, embedding=e) for c, e in texts)},
            )
        )
    return samples


@pytest.mark.parametrize("container", ["tar", "zarr"])
@pytest.mark.parametrize(
    ("latent", "text"), [("bfloat16+zstd", "bfloat16+zstd"), ("int8@40+delta+zstd", "int8@30+zstd")]
)
def test_a_calibrated_estimate_is_within_five_percent_of_the_cache(
    tmp_path: Path, calibrated: Samples, encoded: list[Sample], latent: str, text: str, container: Container
) -> None:
    codecs = {"latent": Codec.parse(latent), "text.t5": Codec.parse(text)}
    Cache.open_or_create(tmp_path, {"latent": {"latent_channels": 16}, "text.t5": {"text_channels": 32}})
    environment = {"device": "cpu", "torch": "2.13.0", "threads": 1}
    with ShardWriter(
        open_store(tmp_path), shard_id="a" * 32, folder=str(BUCKET), container=container, record={"env": environment}
    ) as writer:
        for sample in encoded:
            writer.add(*sample_row(sample, codecs, 0))
        writer.commit()
    actual = sum(path.stat().st_size for kind in ("shards", "index") for path in (tmp_path / kind).rglob("*.*"))
    choice = Choice(latent_codec=codecs["latent"], text_codec=codecs["text.t5"], container=container)
    assert calibrated.encoders is not None
    assert sum(group.num_samples for group in calibrated.groups) == len(encoded)
    predicted = estimate(calibrated.groups, calibrated.encoders, choice, calibrated.bits).total_bytes
    assert predicted == pytest.approx(actual, rel=0.05)


def test_calibration_tells_bits_and_decibels_of_the_quantised_codecs(calibrated: Samples) -> None:
    bits = calibrated.bits.found["latent", "int8@40+delta+zstd"]
    assert bits.sqnr_db == pytest.approx(40, abs=1)
    assert 0 < bits.per_value < calibrated.bits.found["latent", "bfloat16+zstd"].per_value


def test_captions_are_counted_as_the_text_encoder_stores_them(encoded: list[Sample]) -> None:
    (group,) = samples_of_manifest(config()).groups
    stored = [len(text.embedding) for sample in encoded for text in sample.texts["text.t5"]]
    manifest = read_manifest(MANIFEST)
    assert group.num_captions == pytest.approx(sum(len(clip.captions) for clip in manifest.clips) / len(manifest.clips))
    assert group.num_tokens == pytest.approx(sum(stored) / len(stored), rel=0.15)


def test_a_clip_that_is_no_video_lessens_the_samples() -> None:
    clips = len(read_manifest(MANIFEST).clips)
    (group,) = samples_of_manifest(config()).groups
    assert group.num_samples == clips - 1
    (many,) = samples_of_manifest(config(clips=7_000)).groups
    assert many.num_samples == 6_000


def test_buckets_that_no_clip_fills_are_an_error() -> None:
    with pytest.raises(InputError, match="none of 7 probed clips"):
        samples_of_manifest(EstimateConfig(manifest=str(MANIFEST), tokenizer="demo:t5", buckets=("9000x64x64",)))


def test_a_manifest_is_answered_on_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv",
        f"storage_estimates --manifest {MANIFEST} --tokenizer demo:t5 --buckets 16x128x128 8x96x160 --json".split(),
    )
    assert main() == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["bucket"] for each in found["buckets"]} <= {"16x128x128", "8x96x160"}
    assert found["num_samples"] == 6
