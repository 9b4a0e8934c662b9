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
class Cost:
    """What streams cost, cached or encoded while training, in dollars."""

    encode_hours: float
    """GPU hours to encode all samples once."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamCost(Cost):
    """What one stream costs."""

    stream: Literal["latents", "texts"]
    rate: EncodeRate


def together(costs: Sequence[Cost]) -> Cost:
    """Returns what streams cost that one cache holds, or that are all encoded while training."""
    return Cost(
        encode_hours=sum(cost.encode_hours for cost in costs),
        encoding=sum(cost.encoding for cost in costs),
        storing=sum(cost.storing for cost in costs),
        reading=sum(cost.reading for cost in costs),
    )


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
    """Returns in a sentence or two whether to cache.

    A cache holds all streams, and training takes all from it or encodes all: so they are weighed together, and a stream
    that by itself does not pay is named.

    Args:
        costs: Of each stream.
        terms: Epochs, months and prices.
        step_shares: What encoding while training adds to a training step, by stream.
    """
    both, span = together(costs), counted(terms.epochs, "epoch")
    cached, online, after = both.cached(terms.epochs), both.online(terms.epochs), both.break_even_epochs()
    names = " and ".join(cost.stream for cost in costs)
    if after is None or not both.pays(terms.epochs):
        longer = sum((step_shares or {}).get(cost.stream, 0.0) for cost in costs)
        slower = f"; that makes a training step {longer:.0%} longer, though" if longer > _NOTABLE_SHARE else ""
        return (
            f"Do not cache: encoding {names} while training costs {dollars(online)} over {span}, a cache "
            f"{dollars(cached)}{slower}."
        )
    parts = [f"Cache: {names} together pay after {after:.1f} epochs and save {dollars(online - cached)} over {span}."]
    for cost in costs:
        if not cost.pays(terms.epochs):
            more = cost.cached(terms.epochs) - cost.online(terms.epochs)
            alone = cost.break_even_epochs()
            until = "would never pay" if alone is None else f"would pay after {alone:.1f} epochs"
            parts.append(
                f"For the {cost.stream} alone a cache costs {dollars(more)} more than encoding them each time, and "
                f"{until}."
            )
    return " ".join(parts)


def dollars(amount: float) -> str:
    """Returns an amount as people write it: $1,234, or $0.56."""
    return f"${amount:,.0f}" if abs(amount) >= 10 else f"${amount:,.2f}"
