"""What threads that multiply at once do to each other, and what is freed; that products are right is tested beside
those who take them."""

import ctypes
import threading
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
        self.made, self.freed, self.launch = [], [], lambda: None
        self.rows, self.asked, self.checked = {}, [], []

    def offers(self, operation, layouts):
        self.asked = [self.rows[layout.value] for layout in layouts]
        return [cublaslt._Settings()]

    def setting(self, settings, attribute):
        return ALGORITHM.tile if attribute == cublaslt._TILE else 0

    def call(self, name, *arguments):
        if name.endswith("Create"):
            self.made.append(len(self.made) + 1)
            arguments[0]._obj.value = self.made[-1]
        if name == "MatrixLayoutCreate":
            self.rows[self.made[-1]] = arguments[3].value
        if name == "MatmulAlgoCheck":
            self.checked = [self.rows[layout.value] for layout in arguments[2:6]]

    def set(self, what, handle, attribute, value):
        if attribute == cublaslt._BIAS:
            self.bias = value.value
            time.sleep(0.001)

    def function(self, name):
        def multiply(*arguments):
            self.launch()
            self.launched.append((arguments[3], self.bias))  # where the second matrix begins, and the bias
            return 0

        def free(handle):
            self.freed.append(handle.value)
            return 0

        return free if name.endswith("Destroy") else multiply


@pytest.fixture
def library(monkeypatch):
    library = SlowLibrary()
    monkeypatch.setattr(cublaslt, "_library", lambda device: library)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    find_product.cache_clear()
    yield library
    find_product.cache_clear()


def test_each_of_several_threads_adds_its_own_bias(library):
    product = find_product(torch.device("cpu"), (8, 4, 2), ALGORITHM, transposed=True, bias=True)
    a, out = torch.zeros(8, 4), torch.zeros(8, 2)
    pairs = [(torch.zeros(2, 4), torch.zeros(2)) for _ in range(4)]

    def multiply(pair):
        for _ in range(8):
            product(a, pair[0], out, pair[1])

    with ThreadPoolExecutor(len(pairs)) as pool:
        list(pool.map(multiply, pairs))
    assert len(library.launched) == 8 * len(pairs)
    assert set(library.launched) == {(weight.data_ptr(), bias.data_ptr()) for weight, bias in pairs}


def test_the_heuristic_may_be_asked_about_other_rows_than_there_are(library):
    for asked, told in ((None, 9), (16, 16)):
        assert find_product(torch.device("cpu"), (9, 4, 2), ALGORITHM, asked_rows=asked) is not None
        assert library.asked == [4, told, told, told]
        assert library.checked == [4, 9, 9, 9]


def test_a_refused_product_leaves_no_description(library, monkeypatch):
    monkeypatch.setattr(library, "offers", lambda operation, layouts: [])
    assert find_product(torch.device("cpu"), (8, 4, 2), ALGORITHM) is None
    assert len(library.made) == 5
    assert sorted(library.freed) == library.made


def test_descriptions_live_until_the_last_thread_has_multiplied(library):
    launching, may_go_on = threading.Event(), threading.Event()

    def launch():
        launching.set()
        assert may_go_on.wait(60)

    library.launch = launch
    with ThreadPoolExecutor(1) as pool:
        a, weight, out, bias = torch.zeros(8, 4), torch.zeros(2, 4), torch.zeros(8, 2), torch.zeros(2)
        find = {"transposed": True, "bias": True}
        done = pool.submit(find_product(torch.device("cpu"), (8, 4, 2), ALGORITHM, **find), a, weight, out, bias)
        assert launching.wait(60)
        find_product.cache_clear()
        assert not library.freed
        may_go_on.set()
        done.result(60)
    assert sorted(library.freed) == library.made


@pytest.mark.gpu
@pytest.mark.hopper
def test_several_threads_get_pytorchs_products():
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
