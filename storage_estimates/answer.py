"""The whole answer to 'what will it cost, and does it pay?', ready to be shown. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shared.codec import Codec
from shared.costs import VAE_RATES, EncodeRate, gpu_seconds, stdit_step_seconds, t5_rate
from shared.spec import Posterior, VaeGeometry, latent_shape
from storage_estimates.bits import Bits, BitsTable
from storage_estimates.break_even import StreamCost, Terms, recommendation, stream_costs
from storage_estimates.estimate import CacheSize, Choice, Encoders, Group, estimate, material
from storage_estimates.presets import PRESETS
from storage_estimates.prices import Prices

FLOATS = (("float32", "bfloat16"), ("bfloat16", "bfloat16"))
LOSSLESS = ("bfloat16+zstd", "bfloat16+zstd")
COMPACT = ("int8@40+delta+zstd", "int8@30+zstd")
COMPACT_STILLS = ("int8@37+zstd", "int8@30+zstd")
"""Codecs of latents and of texts: the smallest whose decoded videos stay within 0.05 dB, see docs/codecs.md. Latents of
one frame have no differences to take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates that replace the measured ones of ``shared.costs``; on the user's GPU."""

    vae: EncodeRate | None = None
    text: EncodeRate | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is shown."""

    groups: tuple[Group, ...]
    encoders: Encoders
    notes: tuple[str, ...]
    """What the user should know of how the samples were counted."""
    sizes: tuple[CacheSize, ...]
    """Ways of storing the samples, the largest first."""
    chosen: CacheSize
    costs: tuple[StreamCost, ...]
    """Of the chosen way: latents, then texts."""
    terms: Terms
    prices: Prices
    bits: tuple[tuple[str, str, Bits], ...]
    """Stream, codec and bits a value of the entropy-coded payloads."""
    step_shares: tuple[tuple[str, float], ...]
    """What encoding while training adds to a step of STDiT-XL/2, by stream."""

    @property
    def recommendation(self) -> str:
        """In one sentence."""
        return recommendation(self.costs, self.terms, dict(self.step_shares))


def encoders_of(preset: str, *, text_channels: int, max_tokens: int) -> Encoders:
    """Returns the encoders of a preset."""
    return Encoders(
        vae=PRESETS[preset].label,
        geometry=PRESETS[preset].geometry,
        text_channels=text_channels,
        max_tokens=max_tokens,
        pixels_per_second=VAE_RATES[preset].per_second,
    )


def compact_codecs(groups: Sequence[Group], geometry: VaeGeometry) -> tuple[Codec, Codec]:
    """Returns the codecs of latents and of texts that take the fewest bytes at no loss that matters."""
    stills = all(latent_shape(group.bucket, geometry)[1] == 1 for group in groups)
    latent, text = COMPACT_STILLS if stills else COMPACT
    return Codec.parse(latent), Codec.parse(text)


def choices(wish: Choice, compact: tuple[Codec, Codec]) -> list[Choice]:
    """Returns the ways of storing of the first screen, the wished one among them."""
    named = [Choice(latent_codec=Codec.parse(a), text_codec=Codec.parse(b)) for a, b in (*FLOATS, LOSSLESS)]
    named.append(Choice(latent_codec=compact[0], text_codec=compact[1]))
    listed = [replace(each, container=wish.container, posterior=wish.posterior) for each in named]
    other: Posterior = "sample" if wish.posterior == "mean+logvar" else "mean+logvar"
    return list(dict.fromkeys([*listed, wish, replace(wish, posterior=other)]))


def long_choices(compact: tuple[Codec, Codec]) -> list[Choice]:
    """Returns every codec in every container, of a sample or of the whole posterior."""
    pairs = [(Codec.parse(latent), Codec.parse(text)) for latent, text in (*FLOATS, LOSSLESS)]
    return [
        Choice(latent_codec=latent, text_codec=text, container=container, posterior=posterior)
        for latent, text in (*pairs, compact)
        for container in ("tar", "zarr")
        for posterior in ("sample", "mean+logvar")
    ]


def answer(
    groups: Sequence[Group],
    encoders: Encoders,
    wish: Choice,
    *,
    bits: BitsTable,
    terms: Terms,
    prices: Prices,
    rates: Rates,
    notes: Sequence[str] = (),
) -> Answer:
    """Returns sizes, costs and the recommendation for these samples."""
    vae_rate = rates.vae or EncodeRate(
        per_second=encoders.pixels_per_second,
        source=next((rate.source for name, rate in VAE_RATES.items() if PRESETS[name].label == encoders.vae), ""),
    )
    text_rate = rates.text or t5_rate(encoders.text_channels)
    sizes = sorted(
        (estimate(groups, encoders, each, bits) for each in choices(wish, compact_codecs(groups, encoders.geometry))),
        key=lambda size: -size.total_bytes,
    )
    chosen = next(size for size in sizes if size.choice == wish)
    return Answer(
        groups=tuple(groups),
        encoders=encoders,
        notes=tuple(notes),
        sizes=tuple(sizes),
        chosen=chosen,
        costs=tuple(stream_costs(groups, chosen, terms, vae_rate=vae_rate, text_rate=text_rate)),
        terms=terms,
        prices=prices,
        bits=tuple(_bits_used(groups, encoders, sizes, bits)),
        step_shares=_step_shares(groups[0], vae_rate, text_rate, terms.gpu),
    )


def _bits_used(
    groups: Sequence[Group], encoders: Encoders, sizes: Sequence[CacheSize], bits: BitsTable
) -> list[tuple[str, str, Bits]]:
    used = {}
    for size in sizes:
        for stream, codec, kind in (
            ("latents", size.choice.latent_codec, material(encoders.geometry, groups[0].bucket)),
            ("texts", size.choice.text_codec, "text"),
        ):
            if codec.zstd:
                used[stream, str(codec)] = (stream, str(codec), bits.get(codec, kind))
    return list(used.values())


def _step_shares(group: Group, vae_rate: EncodeRate, text_rate: EncodeRate, gpu: str) -> tuple[tuple[str, float], ...]:
    bucket = group.bucket
    if min(bucket.height, bucket.width) < 16:
        return ()
    step = stdit_step_seconds(
        frames=bucket.num_frames, height=bucket.height, width=bucket.width, text_tokens=group.num_tokens, gpu=gpu
    )
    pixels = bucket.num_frames * bucket.height * bucket.width
    return (
        ("latents", gpu_seconds(pixels, vae_rate, gpu) / step),
        ("texts", gpu_seconds(group.num_tokens, text_rate, gpu) / step),
    )
