"""T5-XXL's large products by another algorithm of cuBLASLt are used where measured, and round no worse."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from shared.encoders import t5_products
from shared.encoders.fast_t5 import FastT5, pack
from shared.encoders.t5_products import LEAST_TOKENS, WIDTHS, Products, why_pytorchs

HOPPER = (9, 0)


def make_config(**sizes: int) -> T5Config:
    t5_xxl = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "num_layers": 1, "d_ff": 10240}
    return T5Config(vocab_size=300, feed_forward_proj="gated-gelu", **{**t5_xxl, **sizes})


class Recorded:
    """What multiplies on any device, with what it was found for."""

    def __init__(self, sizes: tuple[int, int, int], *, adds: bool) -> None:
        self.sizes, self.adds = sizes, adds

    def __call__(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        assert (len(a), *b.shape[::-1]) == self.sizes
        out.copy_(a @ b.t() + out if self.adds else a @ b.t())


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """All that is found, where the library has any product of numbers of any type on the CPU."""
    found: list[Recorded] = []

    def find(
        _device: object, sizes: tuple[int, int, int], _algorithm: object, *, transposed: bool, adds: bool
    ) -> Recorded:
        assert transposed
        found.append(Recorded(sizes, adds=adds))
        return found[-1]

    monkeypatch.setattr(t5_products, "find_product", find)
    monkeypatch.setattr(t5_products, "may_multiply", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return found


def test_t5_xxls_products_of_many_tokens_on_hopper_alone_are_chosen(found: list[Recorded]) -> None:
    config = make_config()
    assert why_pytorchs(config, torch.bfloat16, HOPPER) is None
    assert "(8, 0)" in str(why_pytorchs(config, torch.bfloat16, (8, 0)))
    assert "None" in str(why_pytorchs(config, torch.bfloat16, None))
    assert "torch.float32" in str(why_pytorchs(config, torch.float32, HOPPER))
    assert "((1024, 12288), (4096, 1024), (2816, 1024))" in str(
        why_pytorchs(make_config(d_model=1024, d_ff=2816), torch.bfloat16, HOPPER)
    )
    weight, few, many = torch.randn(12, 8), torch.randn(LEAST_TOKENS - 1, 8), torch.randn(LEAST_TOKENS, 8)
    for products in (Products(chosen=True), Products(chosen=False)):
        for tokens in (few, many):
            hidden = torch.randn(len(tokens), len(weight))
            expected = tokens @ weight.t()
            torch.testing.assert_close(products.multiply(tokens, weight), expected)
            expected += hidden
            products.add(hidden, tokens, weight)
            torch.testing.assert_close(hidden, expected)
    assert [(product.sizes, product.adds) for product in found] == [
        ((LEAST_TOKENS, 8, 12), adds) for adds in (False, True)
    ]


def test_a_pass_of_many_tokens_multiplies_by_what_is_found(
    found: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t5_products, "LEAST_TOKENS", 90)
    torch.manual_seed(0)
    model = T5EncoderModel(make_config(d_model=48, d_kv=16, num_heads=3, d_ff=96)).eval().requires_grad_(False)
    ours, without = FastT5(model, max_tokens=40), FastT5(model, max_tokens=40)
    ours._products = Products(chosen=True)
    draw = np.random.default_rng(0)
    for lengths, rows in (([30, 30, 29], None), ([30, 30, 30], 90), ([1, 38, 40, 18], 97)):
        batch = pack([draw.integers(0, 300, length).tolist() for length in lengths], model.device)
        torch.testing.assert_close(ours(batch), without(batch))
        assert [product.sizes for product in found] == ([] if rows is None else [(rows, K, N) for K, N in (
            (48, 144), (48, 48), (96, 48)
        )])  # fmt: skip
        found.clear()


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("tokens", [LEAST_TOKENS, 10001])
def test_a_chosen_product_rounds_no_worse_than_pytorchs(tokens: int, widths: tuple[int, int]) -> None:
    K, N = widths
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, K, device="cuda").bfloat16(), torch.randn(N, K, device="cuda") * K**-0.5
    weight, hidden = weight.bfloat16(), torch.randn(tokens, N, device="cuda").bfloat16()
    rows = torch.arange(0, tokens, 97, device="cuda")
    exact = x[rows].double() @ weight.double().t()
    ours, pytorchs = Products(chosen=True), Products(chosen=False)
    for adds in (False, True):
        if tokens == LEAST_TOKENS:  # others are PyTorch's where cuBLASLt does not offer it
            assert ours.find(x, weight, adds=adds) is not None
        assert pytorchs.find(x, weight, adds=adds) is None
    errors = [(products.multiply(x, weight)[rows] - exact).norm() for products in (ours, pytorchs)]
    assert errors[0] <= 1.001 * errors[1]
    sums = [hidden.clone(), hidden.clone()]
    for products, out in zip((ours, pytorchs), sums, strict=True):
        products.add(out, x, weight)
    exact += hidden[rows]
    errors = [(out[rows] - exact).norm() for out in sums]
    assert errors[0] <= 1.001 * errors[1]
    torch.testing.assert_close(sums[0], sums[1], atol=2e-2, rtol=1e-2)  # all rows: one rounding apart at most


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("last", [120, 1, 39])
def test_a_pass_with_products_chosen_gives_the_bits_of_one_without(last: int) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = T5EncoderModel(make_config()).eval()
    model.requires_grad_(False).to(torch.bfloat16)
    draw = np.random.default_rng(0)
    lengths = [120] * (LEAST_TOKENS // 120 + 1) + [last]
    batch = pack([draw.integers(0, 300, length).tolist() for length in lengths], model.device)
    right = FastT5(copy.deepcopy(model).float(), max_tokens=120)(batch)
    ours, without = (FastT5(model, max_tokens=120, choose_products=choose) for choose in (True, False))
    assert ours.chooses_products
    assert not without.chooses_products
    found = ours(batch)
    assert torch.equal(found, ours(batch))
    assert torch.equal(found, without(batch))
    assert (found.float() - right).norm() <= 1.01 * (without(batch).float() - right).norm()
