"""A frozen autoencoder between frames and latents, with its own published normalisation.

Image autoencoders encode each frame by itself; video autoencoders take clips whole, or in the chunks in which they were
published. See docs/autoencoders.md.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from shared.encoders.fingerprint import WeightFiles, known_weights_sha256
from shared.encoders.vae_files import Description, load_model, read_config
from shared.encoders.vae_graphs import CudaCapture, PassGraphs
from shared.encoders.vae_input import CpuInput, GpuInput
from shared.encoders.vae_memory import find_micro_batch
from shared.encoders.vae_normalisation import Normalisation
from shared.errors import InputError
from shared.spec import Bucket, Posterior, VaeGeometry, latent_shape
from shared.wording import counted

MICRO_BATCH = 16
"""Frames a forward pass, where nothing else is known."""
_DECODE_FRAMES = 16
"""Frames that are decoded at once, at most."""


class VideoAutoencoder:
    """An autoencoder for clips. Build it with :meth:`load`."""

    def __init__(
        self,
        model: Any,
        description: Description,
        *,
        weights: str,
        micro_batch: int,
        micro_batch_pixels: int | None,
        posterior: Posterior,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.geometry = description.family.geometry(description.config)
        """Channels and strides."""
        self.micro_batch = micro_batch
        """Frames a forward pass."""
        self.micro_batch_pixels = micro_batch_pixels
        """Pixels of each of those frames: smaller ones go through in larger numbers. None: as many of any size."""
        self.measure: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        """Entered around the launch of each pass's kernels."""
        self.waiting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        """Entered before each pass, while the GPU has work enough."""
        self.halved = False
        """The memory did not hold the micro-batch of the clips encoded last: they went through in smaller ones."""
        self._model, self._description, self._family = model, description, description.family
        self._posterior, self._device, self._dtype = posterior, device, dtype
        self._weights_sha256 = weights
        self._normalisation = Normalisation(*self._family.normalisation(model), device)
        torch.nn.Module.to(model, device, dtype)
        self._limits: dict[Bucket, int] = {}  # frames a pass, where the memory did not hold the micro-batch
        self._input = CpuInput() if device.type == "cpu" else GpuInput(device)
        self._graphs: PassGraphs | None = None

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        micro_batch: int = MICRO_BATCH,
        micro_batch_pixels: int | None = None,
        posterior: Posterior = "sample",
        compile: bool = False,  # noqa: A002
        graphs: bool = False,
    ) -> "VideoAutoencoder":
        """Loads an autoencoder from a hub id (e.g. ``stabilityai/sd-vae-ft-ema``) or a local folder.

        Args:
            model: Hub id, folder, or ``demo:vae``. Its ``config.json`` names its class.
            device: Where it runs.
            dtype: Type of its weights and activations.
            micro_batch: Frames a forward pass; bounds the memory. Clips of causal video autoencoders stay whole, one
                after the other, whatever this says.
            micro_batch_pixels: Pixels of each of those frames; smaller ones go through in larger numbers.
            posterior: What :meth:`encode` returns of it.
            compile: Compile the encoder, where that gains. For GPUs: the first batch of each size takes a minute.
            graphs: On a GPU, launch small passes of an image autoencoder as CUDA graphs. The same latents; a core of
                the CPU launches them in no time, and up to 2 GB of the GPU's memory are kept for them.

        Raises:
            InputError: if there is no such model, its class is not supported, or it has no posterior to take a sample
                or variances of.
        """
        description = read_config(model)
        if posterior != "mean" and not description.family.has_posterior:
            raise InputError(
                f"VAE {model!r}: {description.class_name} is deterministic, there is no posterior={posterior}: "
                "use --posterior mean"
            )
        files = WeightFiles.of(model)
        loaded = load_model(description)
        vae = cls(
            loaded,
            description,
            weights=known_weights_sha256(loaded, model, files, VERSIONS),
            micro_batch=micro_batch,
            micro_batch_pixels=micro_batch_pixels,
            posterior=posterior,
            device=torch.device(device),
            dtype=dtype,
        )
        if compile:
            description.family.compile(loaded)
        if graphs and description.family.is_image and vae._device.type == "cuda":
            vae._graphs = PassGraphs(lambda units: vae._moments(units, len(units)), CudaCapture(vae._device))
        return vae

    def provenance(self) -> dict[str, Any]:
        """Returns what decides the latents, for ``dataset.json``."""
        made: dict[str, Any] = {
            "model": self._description.model,
            "model_class": self._description.class_name,
            "weights_sha256": self._weights_sha256,
            "precision": str(self._dtype).removeprefix("torch."),
            "latent_channels": self.geometry.latent_channels,
            "spatial_stride": self.geometry.spatial_stride,
            "temporal_stride": self.geometry.temporal_stride,
            "scaling_factor": self._normalisation.scale,
            "shift_factor": self._normalisation.shift,
            "posterior": self._posterior,
            "micro_batch": self.micro_batch,
        }
        if self.geometry.chunk_frames is not None:
            made["chunk_frames"] = self.geometry.chunk_frames
        if self.micro_batch_pixels is not None:
            made["micro_batch_pixels"] = self.micro_batch_pixels
        return made

    def encode(self, frames: np.ndarray, *, seed: str) -> Tensor:
        """Returns what is stored of the posterior, normalised, float32, on this device.

        A sample or the mean is (C, T, H, W). Mean and logarithm of the variance, both of the normalised latent, stand
        one behind the other, (2C, T, H, W): ``mean + exp(logvar / 2) * noise`` is a sample.

        Args:
            frames: (T, height, width, 3), uint8, RGB.
            seed: Names the noise; the sample's identity, so that encoding again gives the same latent anywhere.

        Raises:
            InputError: if the frames do not suit the autoencoder, or the memory does not hold one frame or clip.
        """
        ((_, latent),) = self.encode_each([(seed, frames)])
        return latent

    def encode_each(self, clips: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, Tensor]]:
        """Yields seed and latent of each clip, in order, as :meth:`encode` gives them alone, bit for bit.

        On a GPU, a latent is yielded as soon as its kernels are launched: it may not be computed yet. Nothing here
        waits for them.

        Args:
            clips: Seed and frames of each; all of one shape.

        Raises:
            InputError: as :meth:`encode` does.
        """
        bucket: Bucket | None = None
        for seed, frames in clips:
            if bucket is None:
                bucket = Bucket(*frames.shape[:3])
                latent_shape(bucket, self.geometry)  # refuses what does not suit
                self.halved = bucket in self._limits
            shape = (bucket.num_frames, bucket.height, bucket.width, 3)
            assert (frames.shape, frames.dtype) == (shape, np.uint8), (frames.shape, frames.dtype, shape)
            yield seed, self._encode_clip(seed, frames, bucket)

    def _encode_clip(self, seed: str, frames: np.ndarray, bucket: Bucket) -> Tensor:
        step = self._frames_a_pass(bucket) if self._family.is_image else len(frames)
        moments = []
        for start in range(0, len(frames), step):
            part = frames[start : start + step]
            with self.waiting():
                self._input.wait()
            units = self._input.put(part if self._family.is_image else part[None])
            with self.measure(), torch.inference_mode():
                moments.extend(self._encode_pass(units, bucket))
                self._input.taken()
                if start + step >= len(frames):
                    latent = self._finish(torch.cat(moments), seed)
        return latent

    @torch.inference_mode()
    def decode(self, latent: Tensor, num_frames: int | None = None) -> np.ndarray:
        """Returns the frames (T, height, width, 3), uint8, RGB, of a normalised latent (C, T, H, W).

        Args:
            latent: A sample or a mean.
            num_frames: Frames of the clip. An autoencoder that cuts clips into chunks leaves several numbers possible
                if the last chunk is not whole; without this, the least.
        """
        num_frames = num_frames or self._least_frames(latent.shape[1])
        z = self._normalisation.undo(latent.to(self._device, torch.float32).transpose(0, 1)).to(self._dtype)
        batch = z if self._family.is_image else z.transpose(0, 1)[None]
        pixels = self._family.decode(self._model, batch, num_frames, min(self.micro_batch, _DECODE_FRAMES))
        frames = (pixels if self._family.is_image else pixels[0].transpose(0, 1)).float()
        return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def decode_in_tiles(self) -> None:
        """Has :meth:`decode` take large frames in overlapping tiles, as diffusers does: less memory, and other
        values, since norms see one tile.

        For decoding alone: an autoencoder would encode in tiles, too, and give other latents.

        Raises:
            InputError: if the autoencoder's class cannot.
        """
        if not hasattr(self._model, "enable_tiling"):
            raise InputError(
                f"VAE {self._description.model!r}: {self._description.class_name} does not decode in tiles"
            )
        self._model.enable_tiling()

    def fit_micro_batch(self, bucket: Bucket) -> None:
        """Sets the micro-batch to what the GPU's memory holds of a bucket, the largest of those to come.

        On a CPU, and where clips stay whole, it stays as it is. Frames of smaller buckets go through in larger numbers.

        Raises:
            InputError: if the bucket does not suit the autoencoder.
        """
        latent_shape(bucket, self.geometry)
        if self._device.type == "cpu" or not self._family.cuts_frames:
            return
        size = (bucket.height, bucket.width, 3)

        def encode(frames: int) -> None:
            units = (frames, *size) if self._family.is_image else (1, bucket.num_frames, *size)
            self._moments(torch.zeros(units, dtype=torch.uint8, device=self._device), frames)

        self.micro_batch = find_micro_batch(encode, bucket, device=self._device)
        self.micro_batch_pixels = bucket.height * bucket.width

    def _frames_a_pass(self, bucket: Bucket) -> int:
        if bucket in self._limits:
            return self._limits[bucket]
        if self.micro_batch_pixels is None:
            return self.micro_batch
        return max(1, self.micro_batch * self.micro_batch_pixels // (bucket.height * bucket.width))

    def _least_frames(self, latent_frames: int) -> int:
        stride, chunk = self.geometry.temporal_stride, self.geometry.chunk_frames
        if chunk is None:
            return (latent_frames - 1) * stride + 1
        chunks, rest = divmod(latent_frames, math.ceil(chunk / stride))
        return chunks * chunk + ((rest - 1) * stride + 1 if rest else 0)

    def _encode_pass(self, units: Tensor, bucket: Bucket) -> list[Tensor]:
        """Returns what :meth:`_moments` gives, in parts if the memory does not hold a pass."""
        done, start = [], 0
        while start < len(units):
            frames = self._frames_a_pass(bucket)
            part = units[start : start + frames] if self._family.is_image else units
            with contextlib.suppress(torch.OutOfMemoryError):
                done.append(self._moments(part, frames) if self._graphs is None else self._graphs(part))
                start += len(part)
                continue
            if self._graphs is not None and self._graphs.give_up():
                torch.cuda.empty_cache()
                continue
            self._halve(bucket, min(frames, len(part) if self._family.is_image else bucket.num_frames))
        return done

    def _halve(self, bucket: Bucket, frames: int) -> None:
        """Notes that so many frames of a bucket were too many for the memory."""
        if frames == 1 or not self._family.cuts_frames:
            what = "one frame" if self._family.cuts_frames else f"a whole clip of {counted(bucket.num_frames, 'frame')}"
            raise InputError(
                f"VAE {self._description.model!r}: {self._device} has not the memory for {what} of "
                f"{bucket.height}x{bucket.width}: use a smaller bucket or a larger GPU"
            )
        self._limits[bucket], self.halved = frames // 2, True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _moments(self, units: Tensor, frames: int) -> Tensor:
        """Returns mean and, if it is used, logarithm of the variance, (units, C or 2C, [T,] H, W), float32."""
        if self._family.is_image:
            pixels = units.permute(0, 3, 1, 2).to(self._dtype) / 127.5 - 1
        else:
            pixels = units.permute(0, 4, 1, 2, 3).to(self._dtype, memory_format=torch.contiguous_format) / 127.5 - 1
        mean, logvar = self._family.encode(self._model, pixels, frames)
        if self._posterior == "mean":
            return mean.float()
        assert logvar is not None
        return torch.cat((mean.float(), logvar.float()), dim=1)

    def _finish(self, moments: Tensor, seed: str) -> Tensor:
        """Returns the latent of one clip."""
        if not self._family.is_image:
            moments = moments[0].transpose(0, 1)  # (T, C or 2C, H, W)
        if self._posterior == "mean":
            latent = self._normalisation.apply(moments)
            return latent.transpose(0, 1).contiguous()
        mean, logvar = moments.chunk(2, dim=1)
        if self._posterior == "sample":
            noise = torch.randn(mean.shape, generator=_generator(seed), pin_memory=self._device.type == "cuda")
            mean = mean + torch.exp(0.5 * logvar) * noise.to(self._device, non_blocking=True)
        latent = self._normalisation.apply(mean)
        if self._posterior == "mean+logvar":
            latent = torch.cat([latent, self._normalisation.apply_to_logvar(logvar)], dim=1)
        return latent.transpose(0, 1).contiguous()


def read_geometry(model: str) -> VaeGeometry:
    """Returns a VAE's channels and strides from its configuration, without loading weights.

    Raises:
        InputError: if there is no such model or its class is not supported.
    """
    description = read_config(model)
    return description.family.geometry(description.config)


def _generator(seed: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little", signed=True)
    return torch.Generator().manual_seed(number)


VERSIONS = {"diffusers": diffusers.__version__}
"""Recorded beside every shard."""
