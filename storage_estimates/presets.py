"""The autoencoders of the tables: channels and strides of what is published for diffusers. Pure.

The rates of ``shared.costs`` and the architectures of ``shared.encoders.architectures`` go by the same names; a test
holds these numbers against the classes themselves.
"""

from dataclasses import dataclass

from shared.spec import Bucket, VaeGeometry


@dataclass(frozen=True, kw_only=True, slots=True)
class VaePreset:
    """An autoencoder, as far as sizes go."""

    label: str
    geometry: VaeGeometry
    checkpoint: str
    """A published one of this shape."""
    first_frame_apart: bool = False
    """Causal in time: the first frame is a latent frame of its own, so clips have ``stride * k + 1`` frames."""

    def fitting(self, bucket: Bucket) -> Bucket:
        """Returns the bucket cut to what this autoencoder takes: whole strides, and ``stride * k + 1`` frames."""
        space, time = self.geometry.spatial_stride, self.geometry.temporal_stride
        height, width = (max(pixels // space, 1) * space for pixels in (bucket.height, bucket.width))
        frames = (bucket.num_frames - 1) // time * time + 1 if self.first_frame_apart else bucket.num_frames
        return Bucket(frames, height, width)


def _preset(label: str, checkpoint: str, channels: int, space: int, time: int = 1) -> VaePreset:
    return VaePreset(
        label=label,
        checkpoint=checkpoint,
        geometry=VaeGeometry(latent_channels=channels, spatial_stride=space, temporal_stride=time),
        first_frame_apart=time > 1,
    )


PRESETS: dict[str, VaePreset] = {
    "sd": _preset("Stable Diffusion", "stabilityai/sd-vae-ft-ema", 4, 8),
    "sdxl": _preset("SDXL", "stabilityai/sdxl-vae", 4, 8),
    "cogvideox": _preset("CogVideoX", "THUDM/CogVideoX-2b", 16, 8, 4),
    "wan2.1": _preset("Wan 2.1", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 16, 8, 4),
    "hunyuanvideo": _preset("HunyuanVideo", "hunyuanvideo-community/HunyuanVideo", 16, 8, 4),
    "ltx": _preset("LTX-Video 0.9", "Lightricks/LTX-Video", 128, 32, 8),
    "dc-ae-f32c32": _preset("DC-AE f32c32", "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", 32, 32),
    "dc-ae-f64c128": _preset("DC-AE f64c128", "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers", 128, 64),
}
"""By name."""
