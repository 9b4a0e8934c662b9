"""The kernels that convert to 8 bits against plain PyTorch, bit for bit, and layers on a GPU against those on a CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from train.model.checkpointing import checkpointed
from train.ops import float8
from train.ops.float8 import Float8Rows, WithRows, rows_reference
from train.ops.float8_linear import float8_linear, float8_linear_gelu
from train.ops.linear import linear, linear_gelu
from train.ops.modulation import gate_add_norm_modulate, gate_add_twice, norm_modulate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device with products in 8 bits",
    ),
]

SIZES = [(5, 48), (1000, 1152), (33, 3456), (257, 4608), (3, 16), (70, 1872), (3, 16_384)]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _require_equal(found: Float8Rows, right: Float8Rows) -> None:
    assert torch.equal(found.values.view(torch.uint8), right.values.view(torch.uint8))
    assert torch.equal(found.scales, right.scales)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_are_converted_as_in_plain_pytorch_with_or_without_their_sums(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = _random(*size) * torch.logspace(-6, 6, size[0], device="cuda")[:, None].bfloat16()
    x[0], x[-1] = 0, 448
    right = rows_reference(x)
    _require_equal(float8.to_rows(x), right)
    rows, sums = float8.to_rows_and_sums(x)
    _require_equal(rows, right)
    torch.testing.assert_close(sums, x.double().sum(0).bfloat16(), rtol=2**-7, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("size", [(48, 32), (3456, 1152), (1152, 4608), (1872, 48)], ids=str)
def test_columns_of_a_weight_are_converted_as_in_plain_pytorch(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = _random(*size)
    _require_equal(float8.transposed_to_rows(weight), rows_reference(weight.t()))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_converted_behind_a_gelu_is_what_others_read(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, grad, bias = _random(*size), _random(*size), _random(size[1])
    out, rows = float8.bias_gelu_rows(x, bias)
    _require_equal(rows, rows_reference(out))
    x_grad, grad_rows, bias_grad = float8.bias_gelu_backward_rows(grad, x, bias)
    _require_equal(grad_rows, rows_reference(x_grad))
    own = (x.double() + bias.double()).requires_grad_()
    right = torch.nn.functional.gelu(own, approximate="tanh")
    (right_grad,) = torch.autograd.grad(right, own, grad.double())
    for found, expected in ((out, right), (x_grad, right_grad), (bias_grad, x_grad.double().sum(0))):
        assert ((found.double() - expected).norm() / expected.norm()).item() < 4e-3


@pytest.mark.parametrize(
    "size", [(2, 3, 50, 1152, 1), (3, 4, 7, 1152, 4), (1, 5, 3, 144, 5), (2, 1, 257, 1872, 1)], ids=str
)
def test_what_norms_and_gated_sums_convert_is_what_they_write(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    B, T, S, D, G = size
    x, h = 3 * _random(B, T, S, D), _random(B, T, S, D)
    gate, shift, scale = _random(B, 3, G, D).unbind(1)
    calls: tuple[Callable[[Float8Rows | None], Tensor], ...] = (
        lambda rows: norm_modulate(x, shift, scale, rows),
        lambda rows: gate_add_twice(x, h, gate, rows)[1],
        lambda rows: gate_add_norm_modulate(x, h, gate, shift, scale, rows)[1],
        lambda rows: gate_add_norm_modulate(x, h, None, shift, scale, rows)[1],
    )
    for call in calls:
        rows = float8.empty_rows(x, B * T * S, D)
        out = call(rows)
        _require_equal(rows, rows_reference(out.flatten(0, 2)))
        # compiled by itself, a kernel may join other multiplications and additions: a last bit differs
        torch.testing.assert_close(out, call(None), rtol=2**-7, atol=1e-5)


def test_what_is_not_finite_makes_its_own_row_of_the_product_not_finite() -> None:
    x, weight, bias = _random(4, 64), _random(32, 64), _random(32)
    x[1, 3], x[2, 3] = torch.inf, torch.nan
    assert float8_linear(x, weight, bias).isfinite().all(1).tolist() == [True, False, False, True]


def _with_grads(function: Callable[..., Tensor | WithRows], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    own = [value.detach().requires_grad_() for value in inputs]
    out = function(*own)
    out = out.x if isinstance(out, WithRows) else out
    return [out.detach(), *torch.autograd.grad(out, own, grad)]


@pytest.mark.parametrize("size", [(1024, 1152, 3456), (777, 4608, 1152), (1, 64, 48)], ids=str)
@pytest.mark.parametrize("with_gelu", [False, True])
def test_a_layer_and_its_gradients_are_those_of_plain_pytorch(size: tuple[int, int, int], with_gelu: bool) -> None:
    torch.manual_seed(0)
    N, inputs, outputs = size
    values = [_random(N, inputs), _random(outputs, inputs) / inputs**0.5, _random(outputs)]
    grad = _random(N, outputs)
    ours = float8_linear_gelu if with_gelu else float8_linear
    found = _with_grads(ours, values, grad)
    reference = _with_grads(ours, [value.cpu() for value in values], grad.cpu())
    exact = _with_grads(linear_gelu if with_gelu else linear, [v.double() for v in values], grad.double())
    for index, (f, r, e) in enumerate(zip(found, reference, exact, strict=True)):
        assert f.dtype == torch.bfloat16
        size_of = e.norm()
        against_reference, error, allowed = (
            (a.double() - b.double()).norm() / size_of for a, b in ((f.cpu(), r), (f, e), (r.cuda(), e))
        )
        assert against_reference < 2e-2, f"result {index}: {against_reference:.2e} from plain PyTorch"
        assert error < 1.1 * allowed + 3e-3, f"result {index}: {error:.2e}, plain PyTorch {allowed:.2e}"


def test_layers_computed_again_or_compiled_are_the_same() -> None:
    torch.manual_seed(0)
    values = [_random(300, 64), _random(256, 64) / 8, _random(256), _random(64, 256) / 16, _random(64)]
    grad = _random(300, 64)

    def mlp(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return float8_linear(float8_linear_gelu(x, w, b), w2, b2)

    plain = _with_grads(mlp, values, grad)
    for other in (checkpointed(mlp, "selective"), checkpointed(mlp, "full"), torch.compile(mlp, fullgraph=True)):
        for one, again in zip(plain, _with_grads(other, values, grad), strict=True):
            assert torch.equal(one, again)
