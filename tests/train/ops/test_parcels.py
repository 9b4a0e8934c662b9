"""Tokens in parcels: where they lie, and that kernels write and read them so without changing a bit."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.ops.float8 import empty_rows
from train.ops.modulation import gate_add_norm_modulate, gate_add_twice, norm_modulate
from train.ops.parcels import ordered_shape, parcelled_shape, to_order, to_parcels

SIZES = [
    (2, 3, 50, 1152, 1, 5),
    (3, 4, 8, 1152, 4, 2),
    (1, 5, 3, 100, 5, 3),
    (2, 3, 6, 33, 1, 1),
    (1, 1, 1024, 72, 1, 4),
]
"""B, T, S, D, G and the parcels."""

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def _arranged(parcels: int | None) -> Callable[[Tensor], Tensor]:
    return lambda x: x if parcels is None else to_parcels(x, parcels)


def _norm(parcels: int | None, x: Tensor, _h: Tensor, table: Tensor) -> Tensor:
    return norm_modulate(x, table[:, 1], table[:, 2], parcels=parcels)


def _gate_and_norm(parcels: int | None, x: Tensor, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return gate_add_norm_modulate(x, h, *table.unbind(1), parcels=parcels)


def _sum_and_norm(parcels: int | None, x: Tensor, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return gate_add_norm_modulate(x, h, None, *table[:, 1:].unbind(1), parcels=parcels)


def _gate(parcels: int | None, x: Tensor, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return gate_add_twice(x, h, table[:, 0], parcels=parcels)


def _gate_of_parcels(parcels: int | None, x: Tensor, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    arranged = _arranged(parcels)
    return gate_add_twice(arranged(x), arranged(h), table[:, 0])


def _gate_of_h_in_parcels(parcels: int | None, x: Tensor, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return gate_add_twice(x, _arranged(parcels)(h), table[:, 0])


OPERATIONS = [_norm, _gate_and_norm, _sum_and_norm, _gate, _gate_of_parcels, _gate_of_h_in_parcels]


def _results(
    operation: Operation, parcels: int | None, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns outputs in order, and gradients."""
    own = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = operation(parcels, *own)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    read = [(o, g) for o, g in zip(outputs, grads[: len(outputs)], strict=True) if g is not None]
    arranged = _arranged(parcels)
    torch.autograd.backward([o for o, _ in read], [g if o.ndim == 4 else arranged(g) for o, g in read])
    return [*(to_order(o.detach()) for o in outputs), *(t.grad for t in own)]


def _require_equal(
    operation: Operation, size: tuple[int, ...], dtype: torch.dtype, device: str, which: Sequence[bool] = (True, True)
) -> None:
    torch.manual_seed(0)
    B, T, S, D, G, parcels = size
    x, h, *grads = (torch.randn(B, T, S, D, dtype=torch.float64).to(device, dtype) for _ in range(4))
    table = torch.randn(B, 3, G, D, dtype=torch.float64).to(device, dtype)
    given = [grad if wanted else None for grad, wanted in zip(grads, which, strict=True)]
    in_order, in_parcels = (_results(operation, number, [x, h, table], given) for number in (None, parcels))
    for index, (one, other) in enumerate(zip(in_order, in_parcels, strict=True)):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other), f"result {index}"


def test_places_lie_parcel_by_parcel_and_frames_before_samples() -> None:
    x = torch.arange(2 * 3 * 6).view(2, 3, 6, 1)  # sample, frame, place
    parcels = to_parcels(x, 2)
    assert parcels.shape == parcelled_shape(x.shape, 2) == (2, 3, 2, 3, 1)
    assert parcels.is_contiguous()
    assert parcels[1, 2, 0].flatten().tolist() == [2 * 6 + 3, 2 * 6 + 4, 2 * 6 + 5]
    assert parcels[0, 1, 1].flatten().tolist() == [18 + 6, 18 + 7, 18 + 8]
    assert torch.equal(to_order(parcels), x)
    assert ordered_shape(parcels.shape) == ordered_shape(x.shape) == (2, 3, 6, 1)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__[1:])
def test_plain_pytorch_writes_and_reads_parcels(operation: Operation) -> None:
    _require_equal(operation, (2, 3, 6, 33, 3, 2), torch.float64, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__[1:])
def test_kernels_write_and_read_parcels(operation: Operation, size: tuple[int, ...], dtype: torch.dtype) -> None:
    _require_equal(operation, size, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS[1:], ids=lambda operation: operation.__name__[1:])
def test_kernels_do_so_where_one_of_two_results_is_read_and_where_others_look_on(operation: Operation) -> None:
    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for which in ((True, False), (False, True), (True, True)):
        _require_equal(operation, SIZES[1], torch.float32, "cuda", which)
        with Looking():
            _require_equal(operation, SIZES[1], torch.float32, "cuda", which)


@pytest.mark.gpu
def test_what_is_read_from_parcels_is_written_in_8_bits_in_order() -> None:
    torch.manual_seed(0)
    x, h = (torch.randn(2, 3, 6, 64, device="cuda").bfloat16() for _ in range(2))
    gate, found = torch.randn(2, 1, 64, device="cuda").bfloat16(), []
    for arranged in (_arranged(None), _arranged(3)):
        rows = empty_rows(x, 2 * 3 * 6, 64)
        gate_add_twice(arranged(x), arranged(h), gate, rows)
        found.append(rows)
    assert torch.equal(found[0].values.view(torch.uint8), found[1].values.view(torch.uint8))
    assert torch.equal(found[0].scales, found[1].scales)


def test_operators_on_tensors_without_content_have_the_shapes_that_kernels_give_theirs() -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    x, h, table, moved = empty(2, 3, 8, 64), empty(2, 3, 8, 64), empty(2, 3, 1, 64), empty(4, 3, 2, 2, 64)
    gate, shift, scale = table.unbind(1)
    for outputs, shapes in (
        ((norm_modulate(x, shift, scale, parcels=4),), [moved.shape]),
        (gate_add_norm_modulate(x, h, gate, shift, scale, parcels=4), [x.shape, moved.shape]),
        (gate_add_twice(x, h, gate, parcels=4), [moved.shape] * 2),
        (gate_add_twice(moved, moved, gate), [x.shape] * 2),
        (gate_add_twice(x, moved, gate), [x.shape] * 2),
    ):
        assert [output.shape for output in outputs] == shapes
        for each in (x, h, table, moved):
            each.grad = None
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
        for each in (x, h, table, moved):
            assert each.grad is None or each.grad.shape == each.shape
        assert table.grad is not None
