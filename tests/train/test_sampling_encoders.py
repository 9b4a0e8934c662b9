"""The frames with which a clip begins, and decoding in parts, with a real small autoencoder and real clips."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.encoders.vae import VideoAutoencoder
from shared.errors import InputError
from shared.media.clip import Media, Window
from shared.media.video import decode_window, presentation_times
from shared.spec import Bucket, VaeGeometry
from train.sampling.encoders import decode_latent, encode_head, require_slices, slices

CLIPS = Path(__file__).parents[1] / "data" / "clips"
BIRD = CLIPS / "bird_portrait.mp4"
BUCKET = Bucket(16, 64, 64)


@pytest.fixture(scope="module")
def vae():
    return VideoAutoencoder.load("demo:vae", posterior="mean")


def head_of(vae, file, **options):
    return encode_head(vae, file, BUCKET, vae.geometry, **({"fps": 12.0} | options))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_a_clip_begins_with_the_last_frames_of_a_video_at_the_rate_of_the_model(vae):
    head = head_of(vae, BIRD)
    assert head.latents.shape == (vae.geometry.latent_channels, 4, 8, 8)  # a quarter
    last = int(presentation_times(Media(url=str(BIRD)))[-1] * 12)
    expected = decode_window(
        Media(url=str(BIRD)), None, Window(start=last - 3, num_frames=4, fps=12.0), Bucket(4, 64, 64)
    )
    shown = vae.decode(head.latents, 4)
    first = decode_window(Media(url=str(BIRD)), None, Window(start=0, num_frames=4, fps=12.0), Bucket(4, 64, 64))
    assert difference(shown, expected) < 12
    assert difference(shown, expected) < 0.7 * difference(shown, first)
    assert head_of(vae, BIRD, num_frames=7).latents.shape[1] == 7


def test_an_image_gives_one_frame(vae, tmp_path):
    frame = decode_window(Media(url=str(BIRD)), None, Window(start=5, num_frames=1), Bucket(1, 96, 64))[0]
    Image.fromarray(frame).save(tmp_path / "bird.png")
    head = head_of(vae, tmp_path / "bird.png")
    assert head.latents.shape[1] == 1
    assert difference(vae.decode(head.latents, 1)[0], frame[16:80]) < 12  # cropped to the bucket
    with pytest.raises(InputError, match="asked for 2 frames, and it has 1 at 12 a second: lower"):
        head_of(vae, tmp_path / "bird.png", num_frames=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none.mp4", {}, "--condition .*none.mp4: .*: expected an image or a video"),
        ("not_a_video.mp4", {}, "--condition .*not_a_video.mp4: .*: expected an image or a video"),
        ("bird_portrait.mp4", {"num_frames": 16}, "they make 16 of the clip's 16 latent frames: expected fewer"),
        (
            "cloud_square.mkv",
            {"num_frames": 6, "fps": 2.0},
            "asked for 6 frames, and it has 4 at 2 a second",
        ),
    ],
)
def test_what_a_clip_cannot_begin_with_is_refused(vae, name, options, message):
    with pytest.raises(InputError, match=message):
        head_of(vae, CLIPS / name, **options)


def test_a_clip_decoded_in_parts_is_the_clip_decoded_whole(vae):
    latent = torch.randn(vae.geometry.latent_channels, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = decode_latent(vae.decode, latent, vae.geometry, 5)
    for decode_frames in (1, 2, 4):
        parts = decode_latent(vae.decode, latent, vae.geometry, 5, decode_frames)
        assert parts.shape == (5, 32, 32, 3)
        assert np.abs(parts.astype(int) - whole.astype(int)).max() <= 1  # sums in another order


def test_parts_are_frames_chunks_or_whole_clips():
    chunks = VaeGeometry(latent_channels=4, spatial_stride=8, temporal_stride=4, chunk_frames=17)
    assert list(slices(chunks, 51, 16)) == [(slice(0, 5), 17), (slice(5, 10), 17), (slice(10, 15), 17)]
    assert list(slices(chunks, 40, 34)) == [(slice(0, 10), 34), (slice(10, 12), 6)]
    causal = VaeGeometry(latent_channels=4, spatial_stride=8, temporal_stride=4)
    assert list(slices(causal, 33, 16)) == [(slice(None), 33)]
    require_slices(chunks, 34)
    require_slices(causal, None)
    with pytest.raises(InputError, match="decode_frames=8: this autoencoder decodes a clip whole"):
        require_slices(causal, 8)
    with pytest.raises(InputError, match="decode_frames=8: this autoencoder decodes chunks of 17 frames"):
        require_slices(chunks, 8)


def test_large_frames_are_decoded_in_tiles_when_asked_for():
    vae = VideoAutoencoder.load("demo:vae", posterior="mean")
    frames = decode_window(Media(url=str(BIRD)), None, Window(start=5, num_frames=1), Bucket(1, 320, 320))
    latent = vae.encode(frames, seed="bird")
    whole = vae.decode(latent, 1)
    vae.decode_in_tiles()
    tiles = vae.decode(latent, 1)
    assert tiles.shape == whole.shape
    assert 0 < difference(tiles, whole) < 8
