"""Videos from prompts while a run goes on: its weights, the encoders of its cache, files in ``OUTPUT/previews``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.spec import Bucket
from train.boards import Board
from train.diffusion.samplers import Sampler, create_sampler
from train.held_out import FixedSamples
from train.index_columns import IMAGE_FPS
from train.ops.cpu_bfloat16 import bfloat16_products
from train.parallel.ranks import Ranks
from train.sample_captions import caption_of
from train.sampling.encoders import decode_latent, encode_prompts, load_autoencoder
from train.sampling.files import Format, file_stem, strip, write_video_files
from train.sampling.latents import ClipSize, sample_latents
from train.sampling.prompts import read_prompts
from train.setup import CheckedRun

FOLDER = "previews"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What to show."""

    text: str
    embedding: Tensor
    """(L, D) float32, on the CPU."""


class Previews:
    """Makes the same videos again and again, each time with the weights as they are.

    Args:
        run: Whose model is shown.
        ranks: All of them call every method.

    Raises:
        InputError: if the cache's encoders cannot be found, or no prompt.
    """

    def __init__(self, run: CheckedRun, ranks: Ranks) -> None:
        self._run, self._ranks = run, ranks
        options = run.config.evaluation
        self._sampler: Sampler = create_sampler(None, options.preview_sampling_steps, run.objective)
        ranks.agree(lambda: self._require_autoencoder() if ranks.is_first else None)
        prompts: list[Prompt] = ranks.agree(lambda: self._find_prompts() if ranks.is_first else [])
        self._prompts = ranks.from_first(prompts)
        bucket = max(run.plan.buckets, key=lambda each: run.index.buckets[each].num_samples)
        self._bucket: Bucket = bucket
        self._size = ClipSize(
            latent=run.index.latent_size(bucket),
            height=bucket.height,
            width=bucket.width,
            fps=run.index.fps(bucket) if bucket.num_frames > 1 else IMAGE_FPS,
        )

    def _require_autoencoder(self) -> None:
        """Raises :class:`InputError` if it cannot be found: now, and not when the first videos are due."""
        load_autoencoder(self._run.index.provenance, torch.device("cpu"))

    def _find_prompts(self) -> list[Prompt]:
        config, provenance, options = self._run.config, self._run.index.provenance, self._run.config.evaluation
        if options.preview_prompts is not None:
            texts = read_prompts(options.preview_prompts)
            embeddings = encode_prompts(provenance, texts, self._ranks.device)
            return [Prompt(text=t, embedding=e.cpu()) for t, e in zip(texts, embeddings, strict=True)]
        samples = FixedSamples.open(config, options.previews, held_out=config.data.holdout is not None)
        prompts: list[Prompt] = []
        for batch in samples.read(range(samples.number)):
            embedding = batch.captions[0, 0, : int(batch.mask[0].sum())].float().clone()
            prompts.append(Prompt(text=caption_of(samples, len(prompts)), embedding=embedding))
        return prompts

    @torch.no_grad()
    def make(self, step: int, model: Any, boards: Sequence[Board]) -> list[Path]:
        """Writes an MP4 for each prompt, shows it, and returns the files; on ranks but the first nothing.

        Every rank computes the same, since a forward pass may need them all.

        Args:
            step: Steps taken.
            model: As sampling calls it, in evaluation mode.
            boards: Where to show them.
        """
        run, options, device = self._run, self._run.config.evaluation, self._ranks.device
        latents = []
        for prompt in self._prompts:
            with bfloat16_products(device):
                (latent,) = sample_latents(
                    model,
                    self._sampler,
                    [prompt.embedding.to(device)],
                    self._size,
                    prompts=[prompt.text],
                    seed=run.config.seed,
                    guidance=options.preview_guidance,
                )
            latents.append(latent)
        if not self._ranks.is_first:
            return []
        vae = load_autoencoder(run.index.provenance, device)
        folder = run.config.output / FOLDER / f"step-{step:08d}"
        files = []
        for prompt, latent in zip(self._prompts, latents, strict=True):
            frames = decode_latent(vae.decode, latent, run.index.geometry, self._bucket.num_frames)
            stem = file_stem(prompt.text, run.config.seed)
            formats: tuple[Format, ...] = ("mp4",) if self._bucket.num_frames > 1 else ("png",)
            (file,) = write_video_files(frames, folder, stem, fps=min(self._size.fps, 60.0), formats=formats)
            for board in boards:
                board.clip(step, stem, strip(frames), file, prompt.text)
            files.append(file)
        return files
