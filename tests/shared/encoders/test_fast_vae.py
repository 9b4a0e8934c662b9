"""The fast encoder of image autoencoders gives what diffusers gives."""

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from shared.encoders import fast_vae
from shared.encoders.fast_vae import make_fast, why_not
from shared.encoders.location import locate

STABLE = {"block_out_channels": (32, 64, 96), "layers_per_block": 2, "norm_num_groups": 16}
BARE = {
    "block_out_channels": (24, 48),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def make_vae(config: dict[str, Any]) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = len(config["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        **config,
    )
    with torch.no_grad():
        for weight in vae.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)  # biases and norms are 0 and 1 else
    return vae.eval().requires_grad_(False)


def make_pixels(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        found = vae.encode(pixels).latent_dist.parameters
        assert isinstance(found, Tensor)
        return found


@pytest.mark.parametrize("config", [STABLE, BARE])
def test_moments_are_those_of_plain_diffusers(config: dict[str, Any]) -> None:
    vae = make_vae(config)
    for shape in ((3, 3, 24, 40), (1, 3, 20, 20)):
        pixels = make_pixels(*shape)
        torch.testing.assert_close(make_fast(vae)(pixels), moments(vae, pixels), atol=2e-5, rtol=2e-5)


def test_the_demo_autoencoder_is_known() -> None:
    vae = AutoencoderKL.from_pretrained(locate("demo:vae")).float().eval().requires_grad_(False)
    pixels = make_pixels(2, 3, 32, 48)
    torch.testing.assert_close(make_fast(vae)(pixels), moments(vae, pixels), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("scores", [60**2 * 2, 700, 59])
def test_attention_in_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    vae, pixels = make_vae(STABLE), make_pixels(3, 3, 24, 40)
    expected = moments(vae, pixels)
    monkeypatch.setattr(fast_vae, "MAX_SCORES", scores)
    torch.testing.assert_close(make_fast(vae)(pixels), expected, atol=2e-5, rtol=2e-5)


def test_the_model_is_left_as_it_is() -> None:
    vae, pixels = make_vae(STABLE), make_pixels(2, 3, 24, 24)
    before, expected = copy.deepcopy(vae.state_dict()), moments(vae, pixels)
    layout = {name: value.stride() for name, value in vae.state_dict().items()}
    make_fast(vae)(pixels)
    after = vae.state_dict()
    assert {name: value.stride() for name, value in after.items()} == layout
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(moments(vae, pixels), expected)


def test_other_autoencoders_are_refused_by_name() -> None:
    assert why_not(make_vae(STABLE)) is None
    assert "torch.float16" in str(why_not(make_vae(BARE).half()))
    assert "is not an AutoencoderKL" in str(why_not(torch.nn.Linear(1, 1)))
    relu = AutoencoderKL(act_fn="relu", norm_num_groups=8)
    assert "SiLU" in str(why_not(relu))
    attentive = make_vae(STABLE)
    attentive.encoder.mid_block.attentions[0].heads = 2
    assert "several heads" in str(why_not(attentive))
    with pytest.raises(ValueError, match="use the model itself"):
        make_fast(relu)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [STABLE, BARE, {**STABLE, "block_out_channels": (64, 128), "norm_num_groups": 32}])
def test_kernels_give_what_diffusers_gives(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = make_vae(config).cuda()
    low = copy.deepcopy(vae).to(torch.bfloat16)
    rounded = copy.deepcopy(low).float()
    for shape in ((3, 3, 24, 40), (2, 3, 136, 72), (1, 3, 256, 256)):
        pixels = make_pixels(*shape).cuda()
        torch.testing.assert_close(make_fast(vae)(pixels), moments(vae, pixels), atol=2e-4, rtol=2e-4)
        expected = moments(rounded, pixels.bfloat16().float())
        eager = (moments(low, pixels.bfloat16()).float() - expected).square().mean().sqrt()
        found = make_fast(low)(pixels.bfloat16())
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).square().mean().sqrt() <= 1.5 * eager
        assert torch.equal(make_fast(low)(pixels.bfloat16()), found)
