"""Channels and strides of the presets, against the autoencoders that diffusers builds."""

import diffusers
import pytest
import torch

from shared.costs import VAE_RATES
from shared.encoders.architectures import ARCHITECTURES
from shared.spec import Bucket, latent_shape
from storage_estimates.presets import PRESETS


def test_every_preset_has_an_architecture_and_a_rate() -> None:
    assert set(PRESETS) == set(ARCHITECTURES) == set(VAE_RATES)


@pytest.mark.parametrize("name", PRESETS)
def test_a_latent_has_the_shape_that_the_autoencoder_gives(name: str) -> None:
    architecture, preset = ARCHITECTURES[name], PRESETS[name]
    bucket = Bucket(17, 128, 192)
    with torch.device("meta"):  # shapes alone: no weights, no work
        model = getattr(diffusers, architecture.class_name)(**architecture.config).eval()
        clip = torch.empty(3, bucket.num_frames, bucket.height, bucket.width)
        encoded = model.encode(clip[None] if architecture.video else clip.transpose(0, 1))
    latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    shape = tuple(latent[0].shape) if architecture.video else tuple(latent.transpose(0, 1).shape)
    assert latent_shape(bucket, preset.geometry) == shape


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bucket", [Bucket(64, 512, 512), Bucket(1, 360, 640), Bucket(16, 100, 90)])
def test_a_bucket_is_cut_to_what_the_autoencoder_takes(name: str, bucket: Bucket) -> None:
    fitting = PRESETS[name].fitting(bucket)
    channels, frames, height, width = latent_shape(fitting, PRESETS[name].geometry)
    assert min(channels, frames, height, width) >= 1
    assert fitting.num_frames <= bucket.num_frames
    assert PRESETS[name].fitting(fitting) == fitting
