"""``python -m train.sample``: videos from prompts, with trained weights and the encoders of their cache."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import tyro

from shared.errors import InputError, run_entry_point
from shared.spec import Bucket, latent_shape
from shared.wording import counted
from train.diffusion.samplers import Sampler, create_sampler
from train.index_columns import IMAGE_FPS
from train.sampling.batch_size import usual_batch
from train.sampling.config import SampleConfig
from train.sampling.encoders import decode_latent, encode_head, encode_prompts, load_autoencoder, require_slices
from train.sampling.files import (
    IMAGE_FORMATS,
    VIDEO_FORMATS,
    file_stem,
    grid_stem,
    strip,
    write_grid,
    write_video_files,
)
from train.sampling.latents import ClipSize, sample_latents
from train.sampling.prompts import read_prompts
from train.sampling.sources import Source, open_source


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is to be made, checked."""

    prompts: list[str]
    bucket: Bucket
    size: ClipSize
    fps: float
    """Of the files."""
    sampler: Sampler


def sample_videos(config: SampleConfig) -> int:
    """Samples a video for each prompt, writes the files, and returns the exit code.

    Raises:
        InputError: for weights, a size, a sampler or encoders that do not fit.
    """
    source = open_source(config)
    plan = _check(config, source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captions = encode_prompts(source.provenance, plan.prompts, device)
    model = source.load().to(device)
    if device.type == "cuda" and source.bfloat16:
        model.bfloat16()
    vae = load_autoencoder(source.provenance, device)
    head = None
    if config.condition is not None:
        head = encode_head(
            vae, config.condition, plan.bucket, source.geometry, fps=plan.fps, num_frames=config.condition_frames
        )
    if config.decode_tiles:  # not before: it would change what the head is encoded to
        vae.decode_in_tiles()
    formats = config.formats or (VIDEO_FORMATS if plan.bucket.num_frames > 1 else IMAGE_FORMATS)
    at_once = config.batch_size
    if at_once is None:
        longest = max(len(caption) for caption in captions)
        at_once = usual_batch(model, plan.size, (longest, captions[0].shape[1]), device, guidance=config.guidance)
    strips = []
    for start in range(0, len(plan.prompts), at_once):
        some = plan.prompts[start : start + at_once]
        with _enough_memory(len(some), plan.bucket):
            latents = sample_latents(
                model,
                plan.sampler,
                captions[start : start + at_once],
                plan.size,
                prompts=some,
                seed=config.seed,
                guidance=config.guidance,
                guidance_channels=config.guidance_channels,
                head=head,
            )
        for prompt, latent in zip(some, latents, strict=True):
            frames = decode_latent(vae.decode, latent, source.geometry, plan.bucket.num_frames, config.decode_frames)
            stem = file_stem(prompt, config.seed)
            files = write_video_files(frames, config.output, stem, fps=plan.fps, formats=formats)
            strips.append(strip(frames))
            print(f"{prompt!r}: {', '.join(map(str, files)) or 'in the grid'}", flush=True)
    if "grid" in formats:
        print(write_grid(strips, config.output, grid_stem(plan.prompts, config.seed)), flush=True)
    return 0


@contextmanager
def _enough_memory(number: int, bucket: Bucket) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        advice = "use a smaller --batch-size" if number > 1 else "use fewer frames, or a smaller height and width"
        raise InputError(
            f"the device has not the memory to sample {counted(number, 'clip')} of {bucket} at once: {advice}"
        ) from None


def _check(config: SampleConfig, source: Source) -> _Plan:
    prompts = [*config.prompt, *(read_prompts(config.prompts) if config.prompts is not None else [])]
    if config.guidance != 1 and not source.null_caption:
        raise InputError("the run has caption_dropout=0, so its null caption is untrained: use --guidance 1")
    if config.condition is not None and not source.name.startswith("stdit3"):
        raise InputError(f"--condition: {source.name} cannot be told which frames are given: use a stdit3 model")
    if config.condition is not None and source.frame_masks is False:
        print(
            "--condition: the run was trained without --mask-ratios, and knows given frames only if the weights that "
            "it began with do",
            file=sys.stderr,
        )
    usual = source.usual_bucket
    bucket = Bucket(config.num_frames or usual.num_frames, config.height or usual.height, config.width or usual.width)
    _, *latent = latent_shape(bucket, source.geometry)
    require_slices(source.geometry, config.decode_frames)
    fps = config.fps or source.rate(bucket)
    size = ClipSize(
        latent=(latent[0], latent[1], latent[2]),
        height=bucket.height,
        width=bucket.width,
        fps=fps if bucket.num_frames > 1 else IMAGE_FPS,
    )
    sampler = create_sampler(config.sampler, config.steps, source.objective)
    return _Plan(prompts=prompts, bucket=bucket, size=size, fps=fps, sampler=sampler)


def main() -> int:
    """Returns the exit code for the settings of the command line."""
    debug = "--debug" in sys.argv
    return run_entry_point(lambda: sample_videos(tyro.cli(SampleConfig, prog="python -m train.sample")), debug=debug)


if __name__ == "__main__":
    sys.exit(main())
