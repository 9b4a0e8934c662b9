"""Selective checkpointing and the operators of attention packages, whose kernels need a GPU; these here need none."""

import pytest
import torch

from train.model.checkpointing import ActivationCheckpointing, checkpointed


@pytest.mark.parametrize("mode", ["selective", "attention"])
@pytest.mark.parametrize(("namespace", "times"), [("flash_attn", 1), ("of_nobody", 2)])
def test_checkpointing_keeps_what_attention_packages_computed(
    namespace: str, times: int, mode: ActivationCheckpointing
) -> None:
    calls = []

    def square(q, out=None):
        calls.append(q)
        return q.square(), q.sum()

    library = torch.library.Library(namespace, "FRAGMENT")
    library.define("square_for_tests(Tensor q, Tensor(out!)? out=None) -> (Tensor(out!), Tensor)")
    library.impl("square_for_tests", square, "CPU")

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            out, total = getattr(torch.ops, namespace).square_for_tests(q)
            ctx.save_for_backward(q, out, total)
            return out

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    x = torch.tensor([0.5, -2.0], requires_grad=True)
    checkpointed(lambda t: Square.apply(t.sin()).exp(), mode)(x).sum().backward()
    assert len(calls) == times
    expected = 2 * x.sin() * x.cos() * x.sin().square().exp()
    torch.testing.assert_close(x.grad, expected.detach())
