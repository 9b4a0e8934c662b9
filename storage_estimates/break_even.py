"""Encoding once and storing, against encoding in every epoch: hours and money, for latents and texts apart. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.costs import EncodeRate, gpu_seconds
from shared.wording import counted
from storage_estimates.estimate import CacheSize, Group
from storage_estimates.prices import StorageClass

READ_BYTES = 8_000_000
"""Bytes of one read: the loader fetches neighbouring samples of a shard together."""

_NOTABLE_SHARE = 0.1
"""Of a training step; what adds more is said even where it costs less than a cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What the user plans and pays."""

    epochs: float
    months: float
    gpu: str
    gpu_hour: float
    """Dollars."""
    storage: StorageClass
    egress: bool
    """Training is elsewhere than the storage: every byte that is read leaves the provider."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamCost:
    """What one stream costs, cached or encoded while training, in dollars."""

    stream: Literal["latents", "texts"]
    encode_hours: float
    """GPU hours to encode all samples once."""
    rate: EncodeRate
    encoding: float
    """Of those hours."""
    storing: float
    """For the months of the terms, the puts included."""
    reading: float
    """An epoch: gets, retrieval, egress."""

    def cached(self, epochs: float) -> float:
        """Returns the dollars of encoding once, storing, and reading in every epoch."""
        return self.encoding + self.storing + self.reading * epochs

    def online(self, epochs: float) -> float:
        """Returns the dollars of encoding in every epoch."""
        return self.encoding * epochs

    def break_even_epochs(self) -> float | None:
        """Returns after how many epochs the cache is the cheaper way, or None if it never is."""
        gain = self.encoding - self.reading
        return (self.encoding + self.storing) / gain if gain > 0 else None

    def pays(self, epochs: float) -> bool:
        """Returns whether the cache is the cheaper way over so many epochs."""
        return self.cached(epochs) < self.online(epochs)


def stream_costs(
    groups: Sequence[Group], size: CacheSize, terms: Terms, *, vae_rate: EncodeRate, text_rate: EncodeRate
) -> list[StreamCost]:
    """Returns the costs of latents and of texts.

    The overhead of containers and index, and the steps of a price, are shared in proportion to the bytes.

    Args:
        groups: The samples.
        size: What they take in the way chosen.
        terms: Epochs, months and prices.
        vae_rate: Pixels a second of the measured GPU.
        text_rate: Tokens a second of the measured GPU.
    """
    pixels = sum(g.num_samples * g.bucket.num_frames * g.bucket.height * g.bucket.width for g in groups)
    tokens = sum(g.num_samples * g.num_captions * g.num_tokens for g in groups)
    payload = size.latent_bytes + size.text_bytes
    month = terms.storage.month(size.total_bytes)
    costs = []
    streams: list[tuple[Literal["latents", "texts"], float, EncodeRate, float]] = [
        ("latents", pixels, vae_rate, size.latent_bytes),
        ("texts", tokens, text_rate, size.text_bytes),
    ]
    for stream, units, rate, num_bytes in streams:
        share = num_bytes / payload
        stored_gb = share * size.total_bytes / terms.storage.gb_bytes
        a_gb = terms.storage.retrieval_gb + (terms.storage.egress_gb if terms.egress else 0.0)
        hours = gpu_seconds(units, rate, terms.gpu) / 3600
        months = max(terms.months, terms.storage.minimum_months)
        costs.append(
            StreamCost(
                stream=stream,
                encode_hours=hours,
                rate=rate,
                encoding=hours * terms.gpu_hour,
                storing=share * (month * months + size.num_objects / 1000 * terms.storage.write_1000),
                reading=stored_gb * a_gb + share * size.total_bytes / READ_BYTES / 1000 * terms.storage.read_1000,
            )
        )
    return costs


def recommendation(costs: Sequence[StreamCost], terms: Terms, step_shares: Mapping[str, float] | None = None) -> str:
    """Returns in one sentence what to cache.

    Args:
        costs: Of each stream.
        terms: Epochs, months and prices.
        step_shares: What encoding while training adds to a training step, by stream.
    """
    worth = [cost for cost in costs if cost.pays(terms.epochs)]
    rest = [cost for cost in costs if not cost.pays(terms.epochs)]
    span = counted(terms.epochs, "epoch")
    parts = []
    if worth:
        saved = sum(cost.online(terms.epochs) - cost.cached(terms.epochs) for cost in worth)
        after = max(_pays_after(cost) for cost in worth)
        names = " and the ".join(cost.stream for cost in worth)
        parts.append(f"cache the {names}: it pays after {after:.1f} epochs and saves {dollars(saved)} over {span}")
    if rest:
        cached, online = (
            sum(way) for way in zip(*((c.cached(terms.epochs), c.online(terms.epochs)) for c in rest), strict=True)
        )
        names = " or the ".join(cost.stream for cost in rest)
        encode = " and ".join({"latents": "the autoencoder", "texts": "T5"}[cost.stream] for cost in rest)
        parts.append(
            f"do not cache the {names}: {encode} while training cost{'s' * (len(rest) == 1)} {dollars(online)} over "
            f"{span}, a cache {dollars(cached)}"
        )
        if (longer := sum((step_shares or {}).get(cost.stream, 0.0) for cost in rest)) > _NOTABLE_SHARE:
            parts.append(f"it makes a training step {longer:.0%} longer, though")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _pays_after(cost: StreamCost) -> float:
    epochs = cost.break_even_epochs()
    assert epochs is not None
    return epochs


def dollars(amount: float) -> str:
    """Returns an amount as people write it: $1,234, or $0.56."""
    return f"${amount:,.0f}" if abs(amount) >= 10 else f"${amount:,.2f}"
