"""The kernels as operators, where there is no GPU: tensors without content have shapes, and keep what a GPU would."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from train.model.attention import KeyMask, attention, caption_attention
from train.model.checkpointing import ActivationCheckpointing, checkpointed
from train.ops.gelu import bias_gelu
from train.ops.linear import _Linear, linear_gelu
from train.ops.modulation import gate_add, gate_add_norm_modulate, norm_modulate
from train.ops.qk_norm import qk_norm
from train.ops.reference import reference_operations
from train.ops.time_attention import time_attention


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _kept_bytes(output: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> int:
    """Returns the bytes that the graph keeps for the backward pass besides the inputs, after running it."""
    outputs = output if isinstance(output, tuple) else (output,)
    kept: dict[int, int] = {}
    for node in {o.grad_fn for o in outputs}:
        for tensor in node.saved_tensors:  # type: ignore[union-attr]
            if tensor is not None and not any(tensor is each for each in inputs):
                kept[id(tensor)] = tensor.numel() * tensor.element_size()
    torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    for each in inputs:
        assert each.grad is not None
        assert each.grad.shape == each.shape
    return sum(kept.values())


def test_attention_along_time_keeps_its_input_alone() -> None:
    qkv, q_norm, k_norm = _empty(2, 16, 9, 3, 4, 72), _empty(72), _empty(72)
    out = time_attention(qkv, q_norm=q_norm, k_norm=k_norm)
    assert out.shape == (2, 16, 9, 4, 72)
    assert _kept_bytes(out, qkv, q_norm, k_norm) == 0


def test_attention_to_captions_keeps_its_output_and_a_sum_for_each_query_and_head() -> None:
    q, kv, mask = _empty(2, 50, 4, 72), _empty(2, 20, 2, 4, 72), _empty(2, 20, dtype=torch.bool)
    out = caption_attention(q, kv, KeyMask(mask, _empty(5, dtype=torch.int32)))
    assert out.shape == q.shape
    assert _kept_bytes(out, q, kv) <= 2 * 50 * 4 * 72 * 2 + 2 * 50 * 4 * 4 + 5 * 4


def test_queries_of_another_type_than_the_captions_are_refused() -> None:
    q, kv = _empty(2, 50, 4, 72), _empty(2, 20, 2, 4, 72, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"queries are torch\.bfloat16, keys and values torch\.float32"):
        caption_attention(q, kv, None)


@pytest.mark.parametrize("groups", [1, 3])
def test_modulation_keeps_the_residual_and_two_statistics_a_token(groups: int) -> None:
    x, h = _empty(2, 3, 5, 64), _empty(2, 3, 5, 64)
    shift, scale, gate = (_empty(2, groups, 64) for _ in range(3))
    statistics = 2 * 3 * 5 * 2 * 4
    assert _kept_bytes(norm_modulate(x, shift, scale), x, shift, scale) == statistics
    assert _kept_bytes(gate_add(x, h, gate), x, h, gate) == 0
    both = gate_add_norm_modulate(x, h, gate, shift, scale)
    assert _kept_bytes(both, x, h, gate, shift, scale) == statistics + 2 * 3 * 5 * 64 * 2


def test_what_is_added_in_another_type_is_refused_and_modulation_in_another_is_not() -> None:
    x, h = _empty(2, 3, 5, 64), _empty(2, 3, 5, 64, dtype=torch.float32)
    shift, scale, gate = (_empty(2, 1, 64, dtype=torch.float32) for _ in range(3))
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16 and what is added to it torch\.float32"):
        gate_add_norm_modulate(x, h, gate, shift, scale)
    assert {t.dtype for t in gate_add_norm_modulate(x, x, gate, shift, scale)} == {torch.bfloat16}


def test_norms_of_queries_and_keys_keep_their_input_alone_and_leave_values_in_it() -> None:
    qkv, q_weight, k_weight = _empty(10, 3, 4, 72), _empty(72), _empty(72)
    q, k, v = qk_norm(qkv, q_weight, k_weight)
    assert (q.stride(), k.stride(), v.stride()) == ((288, 72, 1), (288, 72, 1), (864, 72, 1))
    assert q.shape == k.shape == v.shape == (10, 4, 72)
    node = q.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert {id(t) for t in node.saved_tensors} == {id(qkv), id(q_weight), id(k_weight)}  # type: ignore[union-attr]
    torch.autograd.backward([q, k, v], [torch.empty_like(t) for t in (q, k, v)])
    for each in (qkv, q_weight, k_weight):
        assert each.grad is not None
        assert (each.grad.shape, each.grad.dtype) == (each.shape, each.dtype)


def test_heads_that_no_tile_holds_are_normalised_by_pytorch() -> None:
    for width, by_kernel in ((256, True), (257, False)):
        weights = _empty(width), _empty(width)
        q, _, _ = qk_norm(_empty(2, 5, 3, 2, width), *weights)
        assert q.shape == (2, 5, 2, width)
        assert ("_QkNorm" in str(q.grad_fn.next_functions[0][0])) == by_kernel  # type: ignore[union-attr]


def test_queries_and_keys_are_normalised_head_by_head_and_values_are_not() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    norms = [nn.RMSNorm(6, eps=1e-6, dtype=torch.float64) for _ in range(2)]
    weights = [norm.weight for norm in norms]
    for weight in weights:
        nn.init.uniform_(weight)
    q, k, v = qkv.unbind(2)
    right = norms[0](q), norms[1](k), v
    found = qk_norm(qkv, weights[0], weights[1])
    for ours, expected in zip(found, right, strict=True):
        torch.testing.assert_close(ours, expected)
    grads = [torch.randn_like(q) for _ in range(3)]
    results = [torch.autograd.grad(outputs, [qkv, *weights], grads) for outputs in (found, right)]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_gelu_of_a_linear_layer_keeps_the_product_alone() -> None:
    x, weight, bias = _empty(10, 32), _empty(64, 32), _empty(64)
    product = torch.nn.functional.linear(x, weight)
    out = bias_gelu(product, bias)
    assert "latentmill" in str(out.grad_fn)
    whole = linear_gelu(x, weight, bias)
    assert out.shape == whole.shape == (10, 64)
    assert "latentmill" in str(whole.grad_fn.next_functions[0][0])
    assert _kept_bytes(out, x, weight, bias) == product.numel() * 2


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_linear_layer_does_not_keep_its_inputs(frozen: bool) -> None:
    source, weight, bias = torch.randn(2, 5, 8, requires_grad=True), torch.randn(3, 8), torch.randn(3)
    weight.requires_grad_(not frozen)
    x, kept = source * 2, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = _Linear.apply(x, weight, bias)
    assert (x.data_ptr() in kept) == (not frozen)
    right = torch.nn.functional.linear(source * 2, weight, bias)
    trained = [source] if frozen else [source, weight]
    for found, expected in zip(*(torch.autograd.grad(o.square().sum(), trained) for o in (out, right)), strict=True):
        torch.testing.assert_close(found, expected)


def test_sequences_that_no_tile_holds_go_to_pytorch() -> None:
    assert "latentmill" in str(time_attention(_empty(1, 64, 2, 3, 4, 72)).grad_fn)
    for shape in ((1, 65, 2, 3, 4, 72), (1, 16, 2, 3, 4, 8), (1, 16, 2, 3, 4, 136)):
        assert "latentmill" not in str(time_attention(_empty(*shape)).grad_fn)


def test_a_single_frame_attends_to_itself_without_a_kernel_for_sequences() -> None:
    qkv = torch.randn(2, 1, 5, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    norms = [torch.rand(8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with torch.profiler.profile() as profile:
        out = time_attention(qkv, q_norm=norms[0], k_norm=norms[1])
    assert not any("scaled_dot_product" in event.key for event in profile.key_averages())
    torch.testing.assert_close(out, qkv[:, :, :, 2])
    gradients = torch.autograd.grad(out.square().sum(), [qkv, *norms])
    expected = torch.zeros_like(qkv)
    expected[:, :, :, 2] = 2 * qkv.detach()[:, :, :, 2]
    for found, right in zip(gradients, [expected, *map(torch.zeros_like, norms)], strict=True):
        torch.testing.assert_close(found, right)


def test_reference_operations_use_no_kernel() -> None:
    x, shift, scale = _empty(1, 2, 4, 64), _empty(1, 1, 64), _empty(1, 1, 64)
    assert "latentmill" in str(norm_modulate(x, shift, scale).grad_fn)
    with reference_operations(("time", "captions")):
        assert "latentmill" in str(norm_modulate(x, shift, scale).grad_fn)
    with reference_operations():
        assert "latentmill" not in str(norm_modulate(x, shift, scale).grad_fn)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_norms_of_queries_and_keys_are_computed_again_under_checkpointing(mode: ActivationCheckpointing) -> None:
    calls: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    def block(x: Tensor, weight: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        qkv = (x @ weight).unflatten(1, (3, 2, 32))
        q, k, v = (t.unsqueeze(0) for t in qk_norm(qkv, q_weight, k_weight))
        return attention(q, k, v).flatten(2)

    inputs = [_empty(10, 64), _empty(64, 192), _empty(32), _empty(32)]
    with Counting():
        checkpointed(block, mode)(*inputs).sum().backward()
    assert all(each.grad is not None for each in inputs)
    assert calls.count("latentmill_qk_norm::qk_norm") == 2
    assert calls.count("latentmill_qk_norm::qk_norm_backward") == 1
    assert calls.count("aten::_scaled_dot_product_cudnn_attention") == (1 if mode == "selective" else 2)


def test_what_is_computed_again_under_checkpointing_has_gradients() -> None:
    def block(x: Tensor, h: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        x, y = gate_add_norm_modulate(x, h, gate, shift, scale)
        y = time_attention(torch.cat([y, y, y], dim=-1).unflatten(3, (3, 2, 32))).flatten(3)
        y = y + caption_attention(y.flatten(1, 2).unflatten(2, (2, 32)), kv, None).view_as(y)
        return gate_add(x, y, gate) + norm_modulate(x, shift, scale)

    kv = _empty(2, 20, 2, 2, 32)
    inputs = [_empty(2, 3, 5, 64), _empty(2, 3, 5, 64), *(_empty(2, 1, 64) for _ in range(3))]
    checkpoint(block, *inputs, use_reentrant=False).sum().backward()
    assert all(each.grad is not None for each in (*inputs, kv))
