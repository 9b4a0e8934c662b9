"""The benchmark of what products in 8 bits cost in loss: the same samples in every way, and losses compared by step."""

import dataclasses

import pytest

from shared.errors import InputError
from train.benchmark.products_loss import (
    ProductsLossBenchmark,
    Way,
    compare,
    compared_ways,
    loss_table,
    train_losses,
)


@pytest.fixture
def small(small_cache) -> ProductsLossBenchmark:
    return ProductsLossBenchmark(
        cache=small_cache.url,
        model="stdit-ti/2",
        model_settings=("depth=1", "hidden_size=32", "num_heads=2"),
        steps=4,
        final_steps=2,
        batch_size=2,
        lr=1e-3,
    )


def test_products_in_8_bits_are_trained_on_what_those_in_bfloat16_were(ranks, small):
    config = small
    plain, again = (train_losses(config, ranks, Way(name="plain", seed=0)) for _ in range(2))
    assert plain == again
    float8 = train_losses(config, ranks, Way(name="8 bits", seed=0, products="float8"))
    other = train_losses(config, ranks, Way(name="other", seed=1))
    assert float8[-1] != plain[-1]
    assert float8 == pytest.approx(plain, rel=0.02)
    assert other != pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_step_that_is_not_finite_ends_the_comparison_be_it_the_last(ranks, small, steps):
    config = dataclasses.replace(small, steps=steps, final_steps=1, lr=1e30)
    with pytest.raises(InputError, match="8 bits: step 1 has no finite loss or gradient: use a smaller --lr"):
        train_losses(config, ranks, Way(name="8 bits", seed=0, products="float8"))


def test_every_run_is_compared_with_itself_or_one_before():
    pairs = compared_ways((0, 1, 2))
    for number, (_, other) in enumerate(pairs):
        assert other in [way for way, _ in pairs[: number + 1]]
    for way, other in pairs:
        if way.products == "float8":
            assert (other.seed, other.products) == (way.seed, None)


def test_losses_are_compared_step_by_step_and_at_the_end():
    way, other = Way(name="ours", seed=0), Way(name="theirs", seed=0)
    row = compare(way, [2.5, 1.5, 0.75, 0.75], other, [2.0, 2.0, 1.0, 1.0], final_steps=2)
    assert (row.mean_loss, row.final_loss, row.mean_difference) == (1.375, 0.75, -0.125)
    assert (row.mean_distance, row.final_difference) == (0.375, -0.25)
    assert loss_table([row], 2).splitlines()[-1] == (
        "| ours | 0 | 1.37500 | 0.75000 | theirs, seed 0 | -1.25e-01 | 3.75e-01 | -2.50e-01 |"
    )


def test_settings_that_make_no_comparison_are_refused():
    with pytest.raises(InputError, match="final_steps=300: expected 1 to steps=200"):
        ProductsLossBenchmark(cache="unused", final_steps=300)
    with pytest.raises(InputError, match="seeds=1 1: expected different ones"):
        ProductsLossBenchmark(cache="unused", seeds=(1, 1))
