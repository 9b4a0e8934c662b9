"""Sizes and the bytes that they take."""

import pytest

from shared.codec import Codec, raw_bytes
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry, latent_shape

SD = VaeGeometry(latent_channels=4, spatial_stride=8)


def test_a_latent_of_64_frames_of_512_pixels_has_the_published_size() -> None:
    shape = latent_shape(Bucket(64, 512, 512), SD)
    assert shape == (4, 64, 64, 64)
    assert raw_bytes(Codec.parse("float32"), shape) == 4_194_304
    assert raw_bytes(Codec.parse("bfloat16"), shape) == 2_097_152
    assert raw_bytes(Codec.parse("bfloat16"), (120, 4096)) == 983_040


@pytest.mark.parametrize(("text", "expected"), [("16x256x256", Bucket(16, 256, 256)), ("1x8x24", Bucket(1, 8, 24))])
def test_a_bucket_is_read_back_as_written(text: str, expected: Bucket) -> None:
    assert Bucket.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text", ["", "16x256", "16x256x256x3", "ax2x3", "-1x8x8", "0x8x8", "16x0x8", " 16x8x8", "1.5x8x8"]
)
def test_a_text_that_is_no_bucket_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"expected"):
        Bucket.parse(text)


def test_a_bucket_that_the_stride_does_not_divide_is_refused_with_the_sizes_to_use() -> None:
    with pytest.raises(InputError, match=r"width=252 is not divisible .* stride of 8: use 248 or 256"):
        latent_shape(Bucket(16, 256, 252), SD)


CAUSAL = VaeGeometry(latent_channels=16, spatial_stride=8, temporal_stride=4)
CHUNKED = VaeGeometry(latent_channels=4, spatial_stride=8, temporal_stride=4, chunk_frames=17)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (17, 5)])
def test_a_causal_vae_takes_multiples_of_its_stride_and_one_more(frames: int, latent_frames: int) -> None:
    assert latent_shape(Bucket(frames, 64, 64), CAUSAL)[1] == latent_frames


@pytest.mark.parametrize(("frames", "choices"), [(18, "17 or 21"), (16, "13 or 17"), (2, "1 or 5")])
def test_frames_that_do_not_suit_a_causal_vae_are_refused(frames: int, choices: str) -> None:
    with pytest.raises(InputError, match=rf"{frames} frames do not suit .* use {choices}"):
        latent_shape(Bucket(frames, 64, 64), CAUSAL)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (16, 4), (17, 5), (18, 6), (34, 10), (51, 15), (64, 19)])
def test_a_vae_of_chunks_takes_any_number_of_frames(frames: int, latent_frames: int) -> None:
    assert latent_shape(Bucket(frames, 64, 64), CHUNKED)[1] == latent_frames


def test_a_geometry_is_read_back_from_provenance() -> None:
    known = {"latent_channels": 4, "spatial_stride": 8, "temporal_stride": 4, "chunk_frames": 17, "posterior": "mean"}
    assert VaeGeometry.recorded(known) == CHUNKED
    assert VaeGeometry.recorded({"latent_channels": 4, "spatial_stride": 8}) == SD
