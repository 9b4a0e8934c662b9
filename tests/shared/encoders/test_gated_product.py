"""The inner product of T5 with its gated GELU as one kernel gives what both give by themselves, where it is used."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import T5Config, T5EncoderModel

from shared.encoders.fast_t5 import GATED_TOKENS, FastT5, pack, why_apart

HOPPER = (9, 0)


@dataclass
class Sizes:
    """What of a model's configuration decides."""

    d_model: int = 4096
    d_ff: int = 10240
    is_gated_act: bool = True
    dense_act_fn: str = "gelu_new"
    feed_forward_proj: str = "gated-gelu"


def make_model(dtype: torch.dtype, device: str) -> T5EncoderModel:
    torch.manual_seed(0)
    sizes = {"d_model": 320, "d_kv": 64, "num_heads": 5, "num_layers": 3, "d_ff": 640}
    model = T5EncoderModel(T5Config(vocab_size=300, feed_forward_proj="gated-gelu", **sizes))
    return model.eval().requires_grad_(False).to(device, dtype)


def test_the_gelu_is_fused_into_t5_xxls_product_on_hopper_alone() -> None:
    assert why_apart(Sizes(), torch.bfloat16, HOPPER) is None
    assert "(8, 0)" in str(why_apart(Sizes(), torch.bfloat16, (8, 0)))
    assert "(10, 0)" in str(why_apart(Sizes(), torch.bfloat16, (10, 0)))
    assert "None" in str(why_apart(Sizes(), torch.bfloat16, None))
    assert "torch.float32" in str(why_apart(Sizes(), torch.float32, HOPPER))
    relu = Sizes(is_gated_act=False, dense_act_fn="relu", feed_forward_proj="relu")
    assert "'relu'" in str(why_apart(relu, torch.bfloat16, HOPPER))
    assert "d_ff 10304" in str(why_apart(Sizes(d_ff=10304), torch.bfloat16, HOPPER))
    assert "d_model 4064" in str(why_apart(Sizes(d_model=4064), torch.bfloat16, HOPPER))
    assert why_apart(make_model(torch.float32, "cpu").config, torch.bfloat16, HOPPER) is None
    assert not FastT5(make_model(torch.bfloat16, "cpu"), max_tokens=120).fuses_gelu


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "width", "inner"),
    [(1, 192, 128), (100, 192, 384), (128, 192, 640), (333, 192, 2816), (1700, 192, 2816), (1153, 4096, 10240)],
)
def test_one_kernel_rounds_no_worse_than_two(dtype: torch.dtype, tokens: int, width: int, inner: int) -> None:
    from shared.encoders.gated_product_kernels import GatedWeights
    from shared.encoders.t5_kernels import gated_gelu, rms_norm

    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda").to(dtype)
    norm = (torch.rand(width, device="cuda") + 0.5).to(dtype)
    layers = [(torch.randn(2 * inner, width, device="cuda") * width**-0.5).to(dtype) for _ in range(2)]
    programs = torch.cuda.get_device_properties("cuda").multi_processor_count
    gated = GatedWeights(layers, programs=programs).of_pass(tokens)
    gated._out.fill_(float("nan"))
    normed = rms_norm(hidden, norm, 1e-6)
    for place, weights in enumerate(layers):
        found = gated(place, hidden, norm, 1e-6).float()
        gate, linear = (normed.double() @ weights.double().t()).chunk(2, dim=1)
        expected = (F.gelu(gate, approximate="tanh") * linear).float()
        apart = gated_gelu(normed @ weights.t()).float()
        assert (found - expected).norm() <= (apart - expected).norm()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("tokens", [GATED_TOKENS - 1, GATED_TOKENS, 2 * GATED_TOKENS + 77])
def test_a_batch_with_the_gelu_fused_gives_what_one_without_gives(tokens: int) -> None:
    model = make_model(torch.bfloat16, "cuda")
    draw = np.random.default_rng(0)
    lengths = [119] * (tokens // 119) + [tokens % 119]
    batch = pack([draw.integers(0, 300, length).tolist() for length in lengths], model.device)
    right = FastT5(copy.deepcopy(model).float(), max_tokens=120)(batch)
    fused, apart = FastT5(model, max_tokens=120), FastT5(model, max_tokens=120, fuse_gelu=False)
    assert fused.fuses_gelu
    assert not apart.fuses_gelu
    found, without = fused(batch), apart(batch)
    assert torch.equal(found, fused(batch))
    assert torch.equal(found, without) == (tokens < GATED_TOKENS)
    assert (found.float() - right).norm() <= 1.05 * (without.float() - right).norm()
