"""Products by an algorithm of our choice are PyTorch's, bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from train.ops import products
from train.ops.products import linear_product, product
from train.ops.reference import reference_operations

SIZES = [(32768, 1152, 1152), (32768, 3456, 1152), (65536, 4608, 1152), (24577, 1152, 4608), (16384, 1024, 4096)]
"""M, K, N, for which an H100 has a better algorithm; with a bias, those whose K is not greater than N."""


def test_where_there_is_no_gpu_products_are_pytorchs() -> None:
    a, b, bias = torch.randn(5, 4), torch.randn(4, 3), torch.randn(3)
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(linear_product(a, b.t(), bias), F.linear(a, b.t(), bias))


def test_few_rows_and_long_sums_are_left_to_pytorch() -> None:
    assert products._choose((8192, 1152, 4608), bias=False) is None
    assert products._choose((16384, 1152, 1152), bias=False) is None
    assert products._choose((32768, 4608, 1152), bias=True) is None
    assert products._choose((32768, 4608, 1152), bias=False) == products._choose((32768, 1152, 1152), bias=True)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
def test_no_bit_of_a_product_differs(sizes: tuple[int, int, int]) -> None:
    M, K, N = sizes
    torch.manual_seed(0)
    a = torch.randn(M, K, device="cuda").bfloat16()
    b, bias = torch.randn(K, N, device="cuda").bfloat16(), torch.randn(N, device="cuda").bfloat16()
    weight = b.t().contiguous()
    assert torch.equal(product(a, b), a @ b)
    assert torch.equal(linear_product(a, weight), F.linear(a, weight))
    assert torch.equal(linear_product(a, weight, bias), F.linear(a, weight, bias))


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("sizes", SIZES)
def test_hoppers_algorithms_are_found_for_these_sizes(sizes: tuple[int, int, int]) -> None:
    _, K, N = sizes
    device = torch.device("cuda", torch.cuda.current_device())
    for transposed, with_bias in ((False, False), (True, False), (True, True)):
        found = products._found(device, sizes, transposed, with_bias)
        assert (found is None) == (with_bias and K > N), (transposed, with_bias)


@pytest.mark.gpu
def test_reference_operations_look_for_no_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(32768, 64, device="cuda").bfloat16(), torch.randn(64, 64, device="cuda").bfloat16()
    monkeypatch.setattr(products, "find_product", None)
    products._found.cache_clear()
    with reference_operations(("products",)):
        assert torch.equal(product(a, b), a @ b)


@pytest.mark.gpu
def test_matrices_that_do_not_fit_are_refused_as_pytorch_refuses_them() -> None:
    a, narrow = (torch.zeros(32768, width, device="cuda").bfloat16() for width in (1152, 1024))
    weight, bias = torch.zeros(1152, 1152, device="cuda").bfloat16(), torch.zeros(1024, device="cuda").bfloat16()
    for wrong in (lambda: product(narrow, weight), lambda: linear_product(a, weight, bias)):
        with pytest.raises(RuntimeError, match=r"must match|cannot be multiplied|size"):
            wrong()


@pytest.mark.gpu
def test_rows_that_begin_anywhere_are_taken() -> None:
    whole = torch.randn(32769 * 1152 + 1, device="cuda").bfloat16()
    weight = torch.randn(1152, 1152, device="cuda").bfloat16()
    for begin in (1, 1152):
        rows = whole[begin : begin + 32768 * 1152].view(32768, 1152)
        assert torch.equal(product(rows, weight), rows @ weight)
