"""The Triton kernels against plain PyTorch in float64: forward and every gradient, odd sizes, each dtype.

An error counts against that of plain PyTorch in the same low precision: at most twice as large.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from train.model.attention import KeyMask, caption_attention
from train.ops.gelu import bias_gelu
from train.ops.linear import linear, linear_gelu
from train.ops.modulation import gate_add, gate_add_norm_modulate, gate_add_twice, norm_modulate
from train.ops.qk_norm import qk_norm
from train.ops.reference import reference_operations
from train.ops.time_attention import time_attention

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_ERROR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 2e-6}
"""What rounding alone may cost, of the norm of what is right."""

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def _results(operation: Operation, inputs: Sequence[Tensor | None], grads: Sequence[Tensor], dtype: torch.dtype):
    own = [None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in inputs]
    outputs = operation(*own)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [grad.to(dtype) for grad in grads[: len(outputs)]])
    return [*outputs, *(t.grad for t in own if t is not None)]


def _require_close(operation: Operation, inputs: Sequence[Tensor | None], grads: Sequence[Tensor], dtype: torch.dtype):
    rounded = [None if t is None else t.to(dtype).double() for t in inputs]
    grads = [grad.to(dtype).double() for grad in grads]
    right = _results(operation, rounded, grads, torch.float64)
    with reference_operations():
        plain = _results(operation, rounded, grads, dtype)
    ours = _results(operation, rounded, grads, dtype)
    for index, (r, p, o) in enumerate(zip(right, plain, ours, strict=True)):
        assert o.dtype == dtype
        assert o.shape == r.shape
        size = r.norm().clamp(min=1e-3 * r.numel() ** 0.5)  # with one frame, that of norms is 0
        error, allowed = ((t.double() - r).norm() / size for t in (o, p))
        assert error <= 2 * allowed + _LEAST_ERROR[dtype], f"result {index}: {error:.2e}, plain PyTorch {allowed:.2e}"


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [(2, 16, 9, 16, 72), (1, 5, 7, 3, 72), (2, 4, 5, 2, 64), (1, 64, 3, 2, 104), (1, 33, 5, 3, 32), (1, 1, 70, 1, 128)],
    ids=str,
)
@pytest.mark.parametrize(("has_norm", "has_rope"), [(False, False), (True, True), (True, False), (False, True)])
def test_attention_along_time_and_its_gradients_are_right(
    size: tuple[int, ...], has_norm: bool, has_rope: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    B, T, S, H, P = size
    angles = torch.arange(T, device="cuda")[:, None] * 10_000.0 ** (-torch.arange(P // 2, device="cuda") * 2 / P)
    rope = (angles.cos(), angles.sin()) if has_rope else None

    def operation(qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        return time_attention(qkv, q_norm=q_norm, k_norm=k_norm, rope=rope)

    norms = [1 + 0.3 * _random(P), 1 + 0.3 * _random(P)] if has_norm else [None, None]
    _require_close(operation, [_random(B, T, S, 3, H, P), *norms], [_random(B, T, S, H, P)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [(2, 3, 50, 1152, 1), (3, 4, 7, 1152, 4), (1, 5, 3, 100, 5), (2, 1, 257, 1872, 1), (2, 33_000, 1, 32, 33_000)],
    ids=str,
)
@pytest.mark.parametrize("name", ["norm", "gate", "gate, read twice", "gate and norm", "addition and norm"])
def test_modulation_and_its_gradients_are_right(name: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    B, T, S, D, G = size
    x, h, *grads = (_random(B, T, S, D) for _ in range(4))

    def operation(x: Tensor, h: Tensor | None, table: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        gate, shift, scale = table.unbind(1)  # not contiguous, as in the models
        if h is None:
            return norm_modulate(x, shift, scale)
        if name == "gate":
            return gate_add(x, h, gate)
        if name == "gate, read twice":
            return gate_add_twice(x, h, gate)
        return gate_add_norm_modulate(x, h, gate if name == "gate and norm" else None, shift, scale)

    _require_close(operation, [2 * x + 0.5, None if name == "norm" else h, _random(B, 3, G, D)], grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "lengths"),
    [((2, 300, 120, 3, 72), (120, 7)), ((2, 130, 300, 2, 72), (300, 129)), ((1, 64, 20, 2, 64), None),
     ((1, 1000, 77, 2, 104), (1,)), ((2050, 3, 5, 32, 32), None)],
    ids=str,
)  # fmt: skip
def test_attention_to_captions_and_its_gradients_are_right(
    size: tuple[int, ...], lengths: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    B, N, M, H, P = size
    keys = None
    if lengths is not None:
        keys, _ = KeyMask.valid_first(torch.arange(M, device="cuda") < torch.tensor(lengths, device="cuda")[:, None])

    def operation(q: Tensor, kv: Tensor) -> Tensor:
        return caption_attention(q, kv, keys, backend="math" if q.dtype == torch.float64 else None)

    _require_close(operation, [_random(B, N, H, P), _random(B, M, 2, H, P)], [_random(B, N, H, P)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(1000, 16, 72), (7, 3, 72), (1, 1, 8), (33, 2, 64), (50, 5, 100), (9, 2, 256), (3001, 2, 33)], ids=str
)
@pytest.mark.parametrize("gradients", ["apart", "packed", "transposed"])
def test_norms_of_queries_and_keys_and_their_gradients_are_right(
    gradients: str, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    N, H, P = size

    def operation(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        parts = qk_norm(qkv, q_weight, k_weight)
        if gradients == "packed":
            return (torch.stack(parts, dim=1),)
        return tuple(part.transpose(0, 1) for part in parts) if gradients == "transposed" else parts

    shape = {"apart": (N, H, P), "packed": (N, 3, H, P), "transposed": (H, N, P)}[gradients]
    values = [_random(N, 3, H, P), 1 + 0.3 * _random(P), 1 + 0.3 * _random(P)]
    _require_close(operation, values, [_random(*shape) for _ in range(3)], dtype)


@pytest.mark.parametrize("size", [(2**20 + 3, 1, 16), (2**31 // (3 * 16 * 72) + 50, 16, 72)], ids=str)
def test_norms_of_queries_and_keys_take_the_tokens_of_several_long_videos(size: tuple[int, ...]) -> None:
    N, H, P = size  # more tiles than a grid has on its second axis; more values than 32 bits count
    weights = [torch.rand(P, device="cuda", requires_grad=True) for _ in range(2)]
    qkv = torch.zeros(N, 3, H, P, device="cuda", dtype=torch.bfloat16)
    last = torch.randn(70, 3, H, P, device="cuda").bfloat16()
    qkv[-70:] = last
    results = []
    for each in (qkv.requires_grad_(), last.requires_grad_()):
        grads = [torch.zeros(each.shape[0], H, P, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        for index, grad in enumerate(grads):
            grad[-70:] = last.detach()[:, 2 - index]
        outputs = qk_norm(each, *weights)
        results.append([*outputs, *torch.autograd.grad(outputs, [each, *weights], grads)])
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours[-right.shape[0] :], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(50, 64, 256), (1000, 72, 100), (1, 32, 130), (3001, 16, 4608)], ids=str)
def test_gelu_of_a_linear_layer_and_its_gradients_are_right(size: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    N, inputs, outputs = size
    _require_close(
        linear_gelu, [_random(N, inputs), _random(outputs, inputs), _random(outputs)], [_random(N, outputs)], dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 3, 50, 72, 130), (1, 1, 1, 32, 4), (3, 1, 1500, 16, 1152)], ids=str)
def test_a_linear_layer_and_its_gradients_are_right(size: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    *rows, inputs, outputs = size
    values = [_random(*rows, inputs), _random(outputs, inputs), _random(outputs)]
    _require_close(linear, values, [_random(*rows, outputs)], dtype)


def test_frozen_parameters_of_a_linear_layer_get_no_gradient() -> None:
    x, weight, bias = _random(5, 16).float().requires_grad_(), _random(8, 16).float(), _random(8).float()
    linear(x, weight, bias).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, -1))
    assert weight.grad is None
    assert bias.grad is None


def test_gelu_is_right_far_from_zero() -> None:
    x = torch.tensor([[-1e4, -30.0, -6.0, 6.0, 30.0, 1e4]], device="cuda", requires_grad=True)
    bias = torch.zeros(6, device="cuda", requires_grad=True)
    bias_gelu(x, bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(
        x.grad[0], torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], device="cuda"), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(bias.grad, x.grad[0])


def test_gelu_takes_the_rows_of_several_long_videos() -> None:
    rows, width = 2**21 + 3, 24  # of 32 rows each, more tiles than a grid has on its second axis
    x, bias = torch.randn(rows, width, device="cuda").bfloat16(), torch.randn(width, device="cuda").bfloat16()
    out, right = bias_gelu(x, bias), torch.nn.functional.gelu(x.float() + bias.float(), approximate="tanh")
    torch.testing.assert_close(out.float(), right, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("size", [(1, 1, 7), (3, 200, 130), (1, 5, 5000)], ids=str)
def test_partial_sums_are_added(size: tuple[int, ...]) -> None:
    from train.ops.partial_sums_kernels import add_partial_sums  # Triton is there with CUDA only

    torch.manual_seed(0)
    partial = _random(*size).float()
    out = torch.empty(size[0], size[2], device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(add_partial_sums(partial, out), partial.sum(1).bfloat16())


def test_a_kernel_is_launched_again_past_tritons_python_but_for_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs
    from triton.compiler.compiler import CompiledKernel

    from train.ops.partial_sums_kernels import add_partial_sums

    by_triton, profiled = [], []
    describe = CompiledKernel.launch_metadata
    monkeypatch.setattr(
        CompiledKernel, "launch_metadata", lambda self, *rest: by_triton.append(self.name) or describe(self, *rest)
    )
    partial, out = torch.ones(1, 19, 83, device="cuda"), torch.empty(83, device="cuda")  # a size of no other test
    for times in range(1, 4):
        assert add_partial_sums(partial.fill_(times), out).tolist() == [19 * times] * 83
    assert len(by_triton) == 1
    knobs.runtime.launch_enter_hook.add(profiled.append)
    try:
        assert add_partial_sums(partial.fill_(4), out).tolist() == [76] * 83
    finally:
        knobs.runtime.launch_enter_hook.remove(profiled.append)
    assert (len(by_triton), len(profiled)) == (2, 1)


def test_a_kernel_is_launched_again_on_the_stream_that_is_current_then() -> None:
    from train.ops.partial_sums_kernels import add_partial_sums

    partial, out = torch.zeros(1, 19, 84, device="cuda"), torch.empty(84, device="cuda")
    add_partial_sums(partial, out)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # some 30 ms
        partial.fill_(1)
        add_partial_sums(partial, out)
        assert out.tolist() == [19] * 84


def test_tensors_that_begin_anywhere_are_taken_after_those_that_begin_at_16_bytes() -> None:
    torch.manual_seed(0)
    x, shift, scale = _random(2, 3, 5, 72).bfloat16(), *_random(2, 2, 1, 72).bfloat16()
    whole = torch.empty(x.numel() + 1, device="cuda", dtype=torch.bfloat16)
    shifted = whole[1:].view_as(x).copy_(x)
    for each in (x, shifted, x):
        with reference_operations():
            right = norm_modulate(x.float(), shift.float(), scale.float())
        torch.testing.assert_close(norm_modulate(each, shift, scale).float(), right, atol=2e-2, rtol=2e-2)


def test_a_sample_without_a_caption_attends_to_nothing() -> None:
    keys, _ = KeyMask.valid_first(torch.tensor([[False] * 20], device="cuda"))
    q, kv = (_random(*size).bfloat16().requires_grad_() for size in ((1, 70, 2, 72), (1, 20, 2, 2, 72)))
    out = caption_attention(q, kv, keys)
    out.sum().backward()
    assert not out.any()
    assert q.grad is not None
    assert not q.grad.any()
    assert kv.grad is not None
    assert not kv.grad.any()


def test_equal_inputs_give_equal_gradients_bit_for_bit() -> None:
    inputs = [_random(4, 16, 256, 1152), _random(4, 16, 256, 1152), *_random(4, 3, 1, 1152).unbind(1)]
    grads = [_random(4, 16, 256, 1152), _random(4, 16, 256, 1152)]
    first, second = (_results(gate_add_norm_modulate, inputs, grads, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kernels_do_not_break_a_compiled_graph() -> None:
    def block(x: Tensor, qkv_weight: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor) -> Tensor:
        gate, shift, scale = modulation.unbind(1)
        h = norm_modulate(x, shift, scale)
        qkv = (h @ qkv_weight).unflatten(3, (3, 2, 64))
        q, k, v = qk_norm(qkv, bias[:64], bias[64:])
        h = time_attention(qkv).flatten(3) + (q * k.sigmoid() * v).flatten(3)
        h = linear_gelu(linear(h, weight, bias), weight, bias)
        return gate_add_norm_modulate(x, h, gate, shift, scale)[1]

    inputs = [
        _random(2, 4, 6, 128),
        _random(128, 384) / 12,
        _random(128, 128) / 12,
        _random(128),
        _random(2, 3, 1, 128),
    ]
    grads = [_random(2, 4, 6, 128)]
    compiled = torch.compile(block, fullgraph=True)
    ours, right = (_results(f, inputs, grads, torch.float32) for f in (compiled, block))
    for o, r in zip(ours, right, strict=True):
        torch.testing.assert_close(o, r, rtol=2e-2, atol=2e-2)


def test_reference_operations_launch_no_kernel_of_ours() -> None:
    x, shift, scale = _random(1, 2, 8, 64).float(), *_random(1, 2, 1, 64).float().unbind(1)

    def launched() -> set[str]:
        with torch.profiler.profile() as profile:
            norm_modulate(x, shift, scale)
        return {event.key for event in profile.key_averages()}

    assert "_forward" in launched()
    with reference_operations():
        assert "_forward" not in launched()
