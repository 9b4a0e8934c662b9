"""Products in 8 bits: what conversions lose, what layers compute and keep, here in plain PyTorch."""

import math

import pytest
import torch
from torch import Tensor

from train.model.checkpointing import checkpointed
from train.ops.float8 import (
    Float8Rows,
    WithRows,
    empty_rows,
    product,
    rows_reference,
    to_rows,
    to_rows_and_sums,
    transposed_to_rows,
)
from train.ops.float8_linear import _Linear, float8_linear, float8_linear_gelu
from train.ops.linear import linear, linear_gelu
from train.ops.modulation import gate_add_norm_modulate, gate_add_twice, norm_modulate
from train.planning.allocations import Allocations

_ROUNDING = 2.0**-4
"""Half of the last bit of 3: what a normal number may lose of itself."""


def _layers(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Returns inputs (2, 3, 5, 64), and weights and biases of 96 and 64 outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 64), (96, 64), (96,), (64, 96), (64,)]
    made = [torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) == 2 else 1) for shape in shapes]
    return [value.to(dtype).requires_grad_() for value in made]


def _float8(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return float8_linear(float8_linear_gelu(x, w, b), w2, b2)


def _plain(x: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return linear(linear_gelu(x, w, b), w2, b2)


def _with_grads(function, inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def test_rows_lose_half_a_bit_of_three_whatever_their_size():
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 40)[:, None]
    rows = rows_reference(x)
    assert rows.values.dtype == torch.float8_e4m3fn
    greatest = x.abs().amax(1)
    assert (greatest / rows.scales <= 448).all()
    assert (greatest / rows.scales > 224).all()
    assert all(math.frexp(scale)[0] == 0.5 for scale in rows.scales.tolist())
    allowed = (x.abs() * _ROUNDING).clamp(min=rows.scales[:, None] * 2.0**-10)
    assert ((rows.to_float() - x).abs() <= allowed).all()


def test_a_greatest_value_of_exactly_448_needs_no_scale():
    rows = rows_reference(torch.tensor([[448.0, 1.0], [449.0, 1.0], [224.0, 1.0], [224.5, 1.0]]))
    assert rows.scales.tolist() == [1, 2, 0.5, 1]
    assert rows.values.float()[0].tolist() == [448, 1]


def test_rows_of_zeros_and_of_the_least_numbers_are_finite():
    rows = rows_reference(torch.tensor([[0.0, 0.0], [1e-45, 0.0], [1e-38, 0.0]]))
    assert (rows.scales > 0).all()
    assert rows.to_float().tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_makes_its_own_row_of_the_product_not_finite(wrong: float):
    x, weight, bias, *_ = _layers()
    x = x.detach().flatten(0, 2)
    x[3, 7] = wrong
    out = float8_linear(x, weight, bias)
    assert out.isfinite().all(1).tolist() == [row != 3 for row in range(30)]


def test_a_weight_has_a_scale_for_each_row_of_what_it_is_used_as():
    weight = torch.randn(32, 48) * torch.logspace(-3, 3, 32)[:, None] * torch.logspace(-2, 2, 48)
    forward, transposed = to_rows(weight), transposed_to_rows(weight)
    assert (forward.values.shape, transposed.values.shape) == ((32, 48), (48, 32))
    for rows, right in ((forward, weight), (transposed, weight.t())):
        assert (right.abs().amax(1) / rows.scales > 224).all()
        assert torch.equal(rows.to_float(), rows_reference(right).to_float())


def test_a_product_is_that_of_what_was_rounded():
    a, b, bias = torch.randn(5, 32), torch.randn(16, 32), torch.randn(16)
    left, right = to_rows(a), to_rows(b)
    expected = left.to_float().double() @ right.to_float().double().t() + bias
    torch.testing.assert_close(product(left, right, bias, torch.float32).double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_are_of_what_was_not_rounded():
    x = torch.randn(100, 16)
    rows, sums = to_rows_and_sums(x)
    assert torch.equal(rows.to_float(), rows_reference(x).to_float())
    torch.testing.assert_close(sums, x.sum(0))


def test_norms_and_gated_sums_are_written_in_8_bits_too_where_there_is_room():
    x, h = torch.randn(2, 3, 5, 48), torch.randn(2, 3, 5, 48)
    gate, shift, scale = torch.randn(3, 2, 1, 48)
    for function in (
        lambda rows: norm_modulate(x, shift, scale, rows),
        lambda rows: gate_add_twice(x, h, gate, rows)[1],
        lambda rows: gate_add_norm_modulate(x, h, gate, shift, scale, rows)[1],
    ):
        rows = empty_rows(x, 30, 48)
        out = function(rows)
        assert torch.equal(out, function(None))
        assert torch.equal(rows.to_float(), rows_reference(out.flatten(0, 2)).to_float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_and_their_gradients_are_within_the_rounding_of_8_bits(dtype: torch.dtype):
    right, ours = _with_grads(_plain, _layers()), _with_grads(_float8, _layers(dtype))
    for index, (r, o) in enumerate(zip(right, ours, strict=True)):
        assert o.dtype == dtype
        assert o.shape == r.shape
        error = ((o.float() - r).norm() / r.norm()).item()
        assert error < 0.08, f"result {index}: {error:.3f}"
    last_bias = (ours[-1].float() - right[-1]).norm() / right[-1].norm()
    assert last_bias < 5e-3  # rounded nowhere but to the type


def test_the_gradient_of_a_weight_is_not_rounded_to_8_bits():
    x, weight, bias, *_ = _layers()
    ours, right = (_with_grads(f, [x, weight, bias]) for f in (float8_linear, linear))
    assert ((ours[1] - right[1]).norm() / right[1].norm()).item() > 0.01  # of the inputs
    torch.testing.assert_close(ours[2], right[2], rtol=1e-5, atol=1e-5)


def test_inputs_that_are_in_8_bits_already_are_taken_as_they_are():
    x, weight, bias, *_ = _layers()
    rows = to_rows(x.detach().flatten(0, 2))
    assert torch.equal(float8_linear(WithRows(x, rows), weight, bias), float8_linear(x, weight, bias))
    doubled = Float8Rows(rows.values, 2 * rows.scales)
    torch.testing.assert_close(
        float8_linear(WithRows(x, doubled), weight, bias) - bias, 2 * (float8_linear(x, weight, bias) - bias)
    )


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_layers_have_the_same_gradients(mode: str):
    for plain, again in zip(
        _with_grads(_float8, _layers()), _with_grads(checkpointed(_float8, mode), _layers()), strict=True
    ):
        assert torch.equal(plain, again)


def test_selective_checkpointing_keeps_the_products():
    counted: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func.name())
            return func(*args, **(kwargs or {}))

    inputs = _layers()
    out = checkpointed(_float8, "selective")(*inputs)
    with Count():
        out.sum().backward()
    names = [name.split("::")[1] for name in counted if "latentmill_float8" in name]
    assert "bias_gelu" in names  # computed again
    assert "linear" not in names


def test_a_compiled_graph_is_not_broken():
    compiled = torch.compile(_float8, backend="aot_eager", fullgraph=True)
    for plain, ours in zip(_with_grads(_float8, _layers()), _with_grads(compiled, _layers()), strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_layer_does_not_keep_its_inputs(frozen: bool):
    source, weight, bias = torch.randn(2, 5, 16, requires_grad=True), torch.randn(32, 16), torch.randn(32)
    weight.requires_grad_(not frozen)
    x, kept = source * 2, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = _Linear.apply(x, None, None, weight, bias)
    assert (x.data_ptr() in kept) == (not frozen)
    out.sum().backward()
    assert source.grad is not None
    assert (weight.grad is None) == frozen


def test_without_content_a_layer_keeps_its_inputs_and_holds_8_bits_of_them_for_the_product_alone():
    N, I, O = 1024, 512, 2048  # noqa: E741
    x, weight, bias = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in ((N, I), (O, I), (O,))
    )
    with Allocations() as allocations:
        allocations.leave_out(x, weight, bias)
        out = float8_linear(x, weight, bias)
        kept, peak = allocations.live, allocations.peak
        out.backward(torch.empty_like(out))
    assert kept == 2 * N * O  # the result; the inputs are somebody else's
    assert peak == kept + N * I + O * I + 4 * (N + O)
