"""How the user's own clips compress: some are encoded, and every codec in question is measured on them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from shared.codec import Codec
from shared.errors import InputError
from shared.media.clip import Clip, Window
from shared.media.probe import Probe
from shared.spec import Bucket
from shared.windows import Sampling, centre_start
from shared.wording import counted
from storage_estimates.answer import COMPACT, COMPACT_STILLS, LOSSLESS
from storage_estimates.bits import Bits, BitsTable
from storage_estimates.config import EstimateConfig
from storage_estimates.estimate import Encoders
from storage_estimates.presets import PRESETS
from storage_estimates.samples import Samples

if TYPE_CHECKING:
    from shared.cache.codec_report import CodecRow

Found = dict[tuple[Literal["latent", "text"], str], Bits]


def calibrate(config: EstimateConfig, samples: Samples, probed: Sequence[tuple[Clip, Probe, list[Bucket]]]) -> Samples:
    """Returns the samples with the bits a value of codecs, and the encoders, as found on some of their clips.

    Raises:
        InputError: if a model cannot be loaded, or no clip can be decoded.
    """
    from shared.cache.codec_report import measure  # torch, which the arithmetic needs not
    from shared.costs import VAE_RATES
    from shared.encoders.some_clips import ClipToEncode, encode_clips

    assert config.calibrate is not None
    assert config.vae is not None
    assert config.text_encoder is not None
    clips = [
        ClipToEncode(
            media=clip.media,
            time_range=clip.time_range,
            window=_centre_window(facts, bucket, Sampling(frame_interval=config.frame_interval)),
            bucket=bucket,
            captions=clip.captions,
        )
        for clip, facts, buckets in probed
        for bucket in buckets
    ][: config.calibrate]
    encoded = encode_clips(
        clips,
        vae=config.vae,
        text_encoder=config.text_encoder,
        device=config.device,
        max_tokens=config.tokens,
        cleaning=config.cleaning,
        posterior=config.posterior,
    )
    if not encoded.latents or not encoded.texts:
        raise InputError(
            f"--calibrate {config.calibrate}: none of {counted(len(clips), 'clip')} could be decoded and has a caption"
        )
    latent_codecs, text_codecs = _codecs(config)
    found: Found = {}
    for row in measure(encoded.latents, latent_codecs, repeats=1):
        found["latent", str(row.codec)] = _bits(row, f"{len(encoded.latents)} of your clips")
    for row in measure(encoded.texts, text_codecs, repeats=1):
        found["text", str(row.codec)] = _bits(row, f"{len(encoded.texts)} of your captions")
    encoders = Encoders(
        vae=config.vae,
        geometry=encoded.geometry,
        text_channels=encoded.text_channels,
        max_tokens=config.tokens,
        pixels_per_second=VAE_RATES[config.vae_preset].per_second,
    )
    notes = [f"Calibrated on {counted(len(encoded.latents), 'clip')} and {counted(len(encoded.texts), 'caption')}"]
    if encoded.num_unreadable:
        notes.append(f"{encoded.num_unreadable} of {counted(len(clips), 'clip')} could not be decoded")
    if PRESETS[config.vae_preset].geometry != encoded.geometry and config.vae_frames_per_second is None:
        notes.append(f"GPU hours are those of {PRESETS[config.vae_preset].label}: give --vae-frames-per-second")
    return replace(
        samples,
        bits=BitsTable(found=found),
        encoders=encoders,
        text_channels=encoded.text_channels,
        notes=(*samples.notes, *notes),
    )


def _centre_window(facts: Probe, bucket: Bucket, sampling: Sampling) -> Window:
    start = centre_start(facts.num_frames, sampling.span(bucket.num_frames))
    return Window(start=start, num_frames=bucket.num_frames, interval=sampling.interval)


def _codecs(config: EstimateConfig) -> tuple[list[Codec], list[Codec]]:
    """Returns the codecs of latents and of texts that are in question."""
    names = (LOSSLESS, COMPACT, COMPACT_STILLS)
    wished = config.wished_codecs()
    latents = [Codec.parse(latent) for latent, _ in names] + [codec for codec in wished[:1] if codec]
    texts = [Codec.parse(text) for _, text in names] + [codec for codec in wished[1:] if codec]
    return list(dict.fromkeys(latents)), list(dict.fromkeys(texts))


def _bits(row: "CodecRow", source: str) -> Bits:
    return Bits(per_value=row.bits_per_value, source=source, sqnr_db=row.sqnr_db)
