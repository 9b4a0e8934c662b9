"""What threads that multiply at once do to each other; that products are right is tested beside those who take them."""

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from shared import cublaslt
from shared.cublaslt import Algorithm, find_product

ALGORITHM = Algorithm(tile=29, cluster=2, custom=3)


class SlowLibrary(cublaslt._Library):
    """Takes every algorithm and computes nothing; other threads have their turn between its calls."""

    def __init__(self) -> None:
        self.handle, self.bias, self.launched = ctypes.c_void_p(), None, []

    def offers(self, operation, layouts):
        return [cublaslt._Settings()]

    def setting(self, settings, attribute):
        return ALGORITHM.tile if attribute == cublaslt._TILE else 0

    def call(self, name, *arguments):
        pass

    def set(self, what, handle, attribute, value):
        if attribute == cublaslt._BIAS:
            self.bias = value.value
            time.sleep(0.001)

    def function(self, name):
        def multiply(*arguments):
            self.launched.append((arguments[3], self.bias))  # where the second matrix begins, and the bias
            return 0

        return multiply


def test_each_of_several_threads_adds_its_own_bias(monkeypatch):
    library = SlowLibrary()
    monkeypatch.setattr(cublaslt, "_library", lambda device: library)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    find_product.cache_clear()
    product = find_product(torch.device("cpu"), (8, 4, 2), ALGORITHM, transposed=True, bias=True)
    a, out = torch.zeros(8, 4), torch.zeros(8, 2)
    pairs = [(torch.zeros(2, 4), torch.zeros(2)) for _ in range(4)]

    def multiply(pair):
        for _ in range(8):
            product(a, pair[0], out, pair[1])

    with ThreadPoolExecutor(len(pairs)) as pool:
        list(pool.map(multiply, pairs))
    find_product.cache_clear()
    assert len(library.launched) == 8 * len(pairs)
    assert set(library.launched) == {(weight.data_ptr(), bias.data_ptr()) for weight, bias in pairs}


@pytest.mark.gpu
def test_several_threads_get_pytorchs_products():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its algorithms are Hopper's")
    device = torch.device("cuda", torch.cuda.current_device())
    a, weight = (torch.randn(rows, 1152, device=device).bfloat16() for rows in (32768, 1152))
    product = find_product(device, (32768, 1152, 1152), ALGORITHM, transposed=True, bias=True)
    torch.cuda.synchronize()

    def num_differing(number):
        bias = torch.full((1152,), float(number), device=device).bfloat16()
        expected, out = F.linear(a, weight, bias), torch.empty_like(a)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(50):
            product(a, weight, out, bias)
            wrong += (out != expected).sum()
        return wrong.item()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(num_differing, range(4))) == [0] * 4
