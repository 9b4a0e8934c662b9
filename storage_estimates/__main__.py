"""``python -m storage_estimates``: parse, compute, print. Starts in a moment: imports neither torch nor pyarrow."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import tyro

from shared.codec import Codec
from shared.costs import MEASURED_GPU, PEAK_TFLOPS, EncodeRate
from shared.errors import InputError, run_entry_point
from storage_estimates import report
from storage_estimates.answer import Answer, Rates, answer, compact_codecs, encoders_of, long_choices
from storage_estimates.bits import BitsTable
from storage_estimates.break_even import Terms
from storage_estimates.config import EstimateConfig
from storage_estimates.estimate import CacheSize, Choice, Encoders, Group, estimate
from storage_estimates.presets import PRESETS, VaePreset
from storage_estimates.prices import Prices, read_prices
from storage_estimates.samples import Samples


def main() -> int:
    """Prints the answer."""
    config = tyro.cli(EstimateConfig, prog="python -m storage_estimates")
    prices = read_prices(config.prices)
    terms = _terms(config, prices)
    samples = _samples(config)
    groups, encoders, notes = _fitted(config, samples)
    wish = _wish(config, samples, compact_codecs(groups, encoders.geometry))
    found = answer(
        groups,
        encoders,
        wish,
        bits=samples.bits,
        terms=terms,
        prices=prices,
        rates=_rates(config),
        notes=(*samples.notes, *notes),
    )
    listed = _long(samples) if config.all else [(encoders.vae, size) for size in found.sizes]
    _print(config, found, listed, prices)
    if config.plot is not None:
        from storage_estimates.plot import draw  # matplotlib: a second that others need not wait

        draw(found, config.plot)
        print(f"Drawn: {config.plot}", file=sys.stderr)
    return 0


def _print(config: EstimateConfig, found: Answer, listed: Sequence[tuple[str, CacheSize]], prices: Prices) -> None:
    if config.json:
        content = report.as_json(found)
        if config.all:
            content["all"] = [report.size_json(label, size, prices) for label, size in listed]
        print(json.dumps(content, indent=2))
    elif config.csv:
        print(report.as_csv([report.size_json(label, size, prices) for label, size in listed]), end="")
    else:
        print(report.text(found))
        if config.all:
            print("\n" + report.long_table(listed, prices, config.storage))


def _wish(config: EstimateConfig, samples: Samples, compact: tuple[Codec, Codec]) -> Choice:
    """Returns how the samples are to be stored: as asked for, as the cache does, or compact."""
    latent, text = config.wished_codecs()
    usual = samples.choice or Choice(
        latent_codec=compact[0], text_codec=compact[1], container=config.container, posterior=config.posterior
    )
    return replace(usual, latent_codec=latent or usual.latent_codec, text_codec=text or usual.text_codec)


def _samples(config: EstimateConfig) -> Samples:
    """Returns the samples as the options describe them, or as a manifest or a cache shows them."""
    if config.cache is not None:
        from storage_estimates.from_cache import samples_of_cache  # pyarrow

        return samples_of_cache(config)
    if config.manifest is not None:
        from storage_estimates.from_manifest import samples_of_manifest  # pyarrow and the tokenizer

        return samples_of_manifest(config)
    assert config.clips is not None
    group = Group(
        bucket=config.bucket(),
        num_samples=config.clips,
        num_tokens=float(config.tokens) if config.mean_tokens is None else config.mean_tokens,
    )
    return Samples(groups=(group,), bits=BitsTable(), text_channels=config.text_channels, max_tokens=config.tokens)


def _fitted(config: EstimateConfig, samples: Samples) -> tuple[list[Group], Encoders, list[str]]:
    """Returns the samples as the autoencoder takes them, and what that changed."""
    if samples.encoders is not None:
        return list(samples.groups), samples.encoders, []
    preset = PRESETS[config.vae_preset]
    groups = fit(samples.groups, preset)
    notes = [
        f"{preset.label} takes {after.bucket} of {before.bucket}"
        for before, after in zip(samples.groups, groups, strict=True)
        if before.bucket != after.bucket
    ]
    encoders = encoders_of(config.vae_preset, text_channels=samples.text_channels, max_tokens=samples.max_tokens)
    return groups, encoders, notes


def fit(groups: Sequence[Group], preset: VaePreset) -> list[Group]:
    """Returns the samples cut to what an autoencoder takes."""
    return [replace(group, bucket=preset.fitting(group.bucket)) for group in groups]


def _long(samples: Samples) -> list[tuple[str, CacheSize]]:
    """Returns every choice for every preset."""
    listed = []
    for name, preset in PRESETS.items():
        encoders = encoders_of(name, text_channels=samples.text_channels, max_tokens=samples.max_tokens)
        groups = fit(samples.groups, preset)
        compact = compact_codecs(groups, preset.geometry)
        listed += [(preset.label, estimate(groups, encoders, each, samples.bits)) for each in long_choices(compact)]
    return listed


def _terms(config: EstimateConfig, prices: Prices) -> Terms:
    if config.storage not in prices.storage:
        raise InputError(
            f"--storage {config.storage}: expected one of {', '.join(prices.storage)}, from {config.prices}"
        )
    hour = config.gpu_hour_price
    if hour is None:
        if config.gpu not in prices.gpus:
            raise InputError(f"--gpu {config.gpu}: {config.prices} has no price of it: give --gpu-hour-price")
        hour = prices.gpus[config.gpu].hour
    return Terms(
        epochs=config.epochs,
        months=config.months,
        gpu=config.gpu,
        gpu_hour=hour,
        storage=prices.storage[config.storage],
        egress=config.egress,
    )


def _rates(config: EstimateConfig) -> Rates:
    """Returns the user's own rates, brought to the measured GPU since costs scale them back to the user's."""
    bucket, scale = config.bucket(), PEAK_TFLOPS[MEASURED_GPU] / PEAK_TFLOPS[config.gpu]
    vae = text = None
    if config.vae_frames_per_second is not None:
        pixels = config.vae_frames_per_second * bucket.height * bucket.width
        vae = EncodeRate(per_second=pixels * scale, source="--vae-frames-per-second")
    if config.t5_tokens_per_second is not None:
        text = EncodeRate(per_second=config.t5_tokens_per_second * scale, source="--t5-tokens-per-second")
    return Rates(vae=vae, text=text)


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
