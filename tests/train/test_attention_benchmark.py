"""The benchmark of attention kernels: references, errors and rows, on a CPU."""

import time

import pytest
import torch
from torch.nn.attention import SDPBackend

from shared.errors import InputError
from train.benchmark import attention_kernels
from train.benchmark.attention_kernels import AttentionCase, measure_row, padded_attention, reference, table
from train.model.attention import PACKAGES, attention


def milliseconds(run):
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1000


def case():
    torch.manual_seed(0)
    return AttentionCase.random(2, 33, 2, 12, "cpu")


def wide(q, k, v):
    return padded_attention(q, k, v, 16, SDPBackend.MATH)


def test_the_reference_computes_attention_and_its_gradients_however_few_scores_it_holds():
    q, k, v, grad = (torch.randn(2, 7, 2, 12, dtype=torch.float64) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 12**0.5).softmax(-1)
    out = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    expected = [out, *torch.autograd.grad(out, inputs, grad)]
    for scores in (1, 21, 2**20):
        found = reference(*(t.detach() for t in inputs), grad, scores=scores)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", [attention, wide], ids=["as it is", "padded"])
def test_a_kernel_that_computes_attention_has_an_error_of_a_few_roundings(attend):
    row = measure_row("some", attend, case(), milliseconds)
    assert 0 < row.output_error < 0.05
    assert 0 < row.gradient_error < 0.05
    assert row.both_tflops * row.both_us == pytest.approx(3 * row.forward_tflops * row.forward_us)
    assert row.forward_tflops * row.forward_us == pytest.approx(4 * 2 * 33**2 * 24 / 1e6)


def test_errors_of_output_and_of_gradients_are_seen():
    def forgets_the_scale(q, k, v):
        return wide(q * 12**0.5, k, v)

    def has_a_wrong_gradient(q, k, v):
        return attention(q, k, v) + (v - v.detach())

    row = measure_row("some", forgets_the_scale, case(), milliseconds)
    assert row.output_error > 1
    row = measure_row("some", has_a_wrong_gradient, case(), milliseconds)
    assert row.output_error < 0.05
    assert row.gradient_error > 1


def test_a_kernel_that_refuses_is_a_row_that_says_why():
    def refuses(q, k, v):
        raise RuntimeError("head dim 72 | no\nand a long trace")

    text = table([measure_row(n, a, case(), milliseconds) for n, a in {"cuDNN": attention, "other": refuses}.items()])
    assert "| 2 x 33 | other | failed: head dim 72 / no | " in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {10}


def test_packages_have_rows_where_they_are_installed_and_are_named_where_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_kernels, "installed_packages", lambda: ("flash-attn-3",))
    assert attention_kernels.missing() == ["flash-attn 2"]
    assert list(attention_kernels.ways())[-2:] == ["flash-attn 3", "flash-attn 3, forward by cuDNN"]
    assert "flash-attn 2" not in attention_kernels.ways()
    assert "Not installed, so not measured: flash-attn 2." in table([])
    monkeypatch.setattr(attention_kernels, "installed_packages", lambda: PACKAGES)
    assert list(attention_kernels.ways())[-3:] == ["flash-attn 3", "flash-attn 3, forward by cuDNN", "flash-attn 2"]
    assert "Not installed" not in table([])


def test_it_needs_a_gpu_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="attention: expected a CUDA device, found none"):
        attention_kernels.main([])
