"""Prices, break-even and the recommendation."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from shared.codec import Codec
from shared.costs import EncodeRate
from shared.errors import InputError
from shared.spec import Bucket
from storage_estimates.break_even import StreamCost, Terms, recommendation, stream_costs, together
from storage_estimates.estimate import CacheSize, Choice, Group
from storage_estimates.prices import DEFAULT_FILE, StorageClass, read_prices

PLAIN = StorageClass(
    name="plain",
    label="Plain",
    gb_bytes=1e9,
    gb_month=((math.inf, 0.01),),
    write_1000=1.0,
    read_1000=0.01,
    retrieval_gb=0.0,
    egress_gb=0.5,
    minimum_months=0,
    date="2026-01-01",
    source="made up",
)
TERMS = Terms(epochs=5, months=2, gpu="H200", gpu_hour=3.0, storage=PLAIN, egress=False)
GROUP = Group(bucket=Bucket(10, 100, 100), num_samples=1_000_000, num_tokens=50)
SIZE = CacheSize(
    choice=Choice(latent_codec=Codec.parse("bfloat16"), text_codec=Codec.parse("bfloat16")),
    num_samples=1_000_000,
    num_shards=1000,
    latent_bytes=3e12,
    text_bytes=1e12,
    overhead_bytes=0.0,
)


def costs(terms: Terms = TERMS) -> list[StreamCost]:
    pixels, tokens = EncodeRate(per_second=1e6, source=""), EncodeRate(per_second=1e4, source="")
    return stream_costs([GROUP], SIZE, terms, vae_rate=pixels, text_rate=tokens)


def test_what_a_stream_costs_is_the_arithmetic_by_hand() -> None:
    latents, texts = costs()
    assert latents.encode_hours == pytest.approx(1e11 / 1e6 / 3600)
    assert texts.encode_hours == pytest.approx(5e7 / 1e4 / 3600)
    assert latents.encoding == pytest.approx(latents.encode_hours * 3.0)
    assert latents.storing == pytest.approx(0.75 * (4000 * 0.01 * 2 + 2.002))
    assert texts.reading == pytest.approx(0.25 * 4e12 / 8e6 / 1000 * 0.01)


def test_both_ways_cost_the_same_at_the_break_even() -> None:
    latents, texts = costs()
    for cost in (latents, texts):
        after = cost.break_even_epochs()
        assert after is not None
        assert cost.cached(after) == pytest.approx(cost.online(after))
        assert cost.pays(after * 1.01)
        assert not cost.pays(after * 0.99)


def test_a_cache_that_costs_more_to_read_than_to_make_anew_never_pays() -> None:
    texts = costs(replace(TERMS, egress=True))[1]
    assert texts.reading > texts.encoding
    assert texts.break_even_epochs() is None
    assert not texts.pays(1e9)


def test_a_minimum_of_months_is_billed() -> None:
    longer = replace(TERMS, storage=replace(PLAIN, minimum_months=6))
    assert costs(longer)[0].storing > 2.5 * costs()[0].storing


def test_the_recommendation_weighs_the_streams_together_since_one_cache_holds_them() -> None:
    after = [cost.break_even_epochs() for cost in (*costs(), together(costs()))]
    assert after == pytest.approx([1.82, 8.46, 2.05], abs=0.01)

    def sentence(epochs: float, **shares: float) -> str:
        return recommendation(costs(), replace(TERMS, epochs=epochs), shares)

    assert sentence(2) == (
        "Do not cache: encoding latents and texts while training costs $175 over 2 epochs, a cache $180."
    )
    assert sentence(2, texts=0.02).endswith("a cache $180.")
    assert sentence(2, texts=1.4).endswith("; that makes a training step 140% longer, though.")
    assert sentence(5) == (
        "Cache: latents and texts together pay after 2.1 epochs and save $243 over 5 epochs. For the texts alone a "
        "cache costs $10 more than encoding them each time, and would pay after 8.5 epochs."
    )
    assert sentence(20).endswith("epochs.")
    assert "alone" not in sentence(20)


def test_steps_of_a_price_apply_to_what_lies_beyond_them() -> None:
    stepped = replace(PLAIN, gb_month=((10, 1.0), (20, 0.5), (math.inf, 0.1)))
    assert stepped.month(5e9) == pytest.approx(5.0)
    assert stepped.month(30e9) == pytest.approx(10 + 5 + 1)


def test_the_price_of_50_terabytes_on_s3_is_the_published_one() -> None:
    prices = read_prices(DEFAULT_FILE)
    assert prices.storage["s3-standard"].month(50 * 2**40) == pytest.approx(50 * 1024 * 0.023)
    assert all(each.date and each.source for each in (*prices.storage.values(), *prices.gpus.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gb_month = [[inf, 0.0125]]", "gb_month = [[10, 0.0125]]"), "expected rising steps"),
        (("gb_month = [[inf, 0.0125]]", "gb_month = 3"), "expected rising steps"),
        (("minimum_months = 1\n", ""), "expected date, egress_gb"),
        (("read_1000 = 0.001\n", 'read_1000 = "much"\n'), "expected a number"),
        (("[[storage]]", "[[shelf]]"), "no \\[\\[storage\\]\\]"),
        (('name = "s3-ia"', 'name = "s3-ia'), "not readable as TOML"),
    ],
)
def test_a_wrong_file_of_prices_is_one_clear_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    content = DEFAULT_FILE.read_text()
    assert change[0] in content
    (tmp_path / "prices.toml").write_text(content.replace(*change))
    with pytest.raises(InputError, match=message):
        read_prices(tmp_path / "prices.toml")
