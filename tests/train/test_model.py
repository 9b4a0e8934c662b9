"""STDiT beyond the published tensors: ragged captions, sizes, dropout, initial weights, operations."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared.errors import InputError
from train.model import create_model
from train.model.flops import stdit_forward_flop, stdit_training_flop
from train.model.stdit import STDiT

SMALL = {"hidden_size": 48, "depth": 2, "num_heads": 3, "caption_channels": 16, "model_max_length": 9}


def small_model(**options: object) -> STDiT:
    torch.manual_seed(0)
    model = create_model("stdit-ti/2", **SMALL, **options)
    for parameter in model.parameters():  # past the zeros of the initial weights, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_ragged_captions_equal_runs_of_each_sample_alone():
    model = small_model()
    lengths = [9, 1, 4]
    x, t, y = torch.randn(3, 4, 2, 4, 6), torch.tensor([3.0, 500.0, 999.0]), torch.randn(3, 1, 9, 16)
    mask = torch.zeros(3, 9, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    together = model(x, t, y, mask)
    for row, length in enumerate(lengths):
        alone = model(x[row : row + 1], t[row : row + 1], y[row : row + 1, :, :length])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_padding_has_no_influence_and_no_gradient():
    model = small_model()
    x, t = torch.randn(2, 4, 2, 4, 4), torch.tensor([10.0, 20.0])
    y = torch.randn(2, 1, 6, 16, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    model(x, t, y, mask).square().sum().backward()
    assert y.grad[1, 0, :2].abs().min() > 0
    assert y.grad[1, 0, 2:].abs().max() == 0


def test_one_model_takes_any_size_that_the_patch_divides():
    model = small_model()
    for size in [(1, 4, 4), (3, 2, 8), (16, 6, 4)]:
        output = model(torch.randn(1, 4, *size), torch.tensor([5.0]), torch.randn(1, 1, 3, 16))
        assert output.shape == (1, 8, *size)
    with pytest.raises(InputError, match=r"2x5x4 .* not divisible by the patch of 1x2x2"):
        model(torch.randn(1, 4, 2, 5, 4), torch.tensor([5.0]), torch.randn(1, 1, 3, 16))


def test_a_dropped_caption_is_the_null_caption_under_the_same_mask():
    model = small_model()
    x, t, y = torch.randn(2, 4, 2, 4, 4), torch.tensor([10.0, 20.0]), torch.randn(2, 1, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    dropped = model(x, t, y, mask, drop_caption=torch.tensor([False, True]))
    null = model.y_embedder.y_embedding[None, None, :5]
    torch.testing.assert_close(dropped[0], model(x, t, y, mask)[0])
    torch.testing.assert_close(dropped[1], model(x, t, null.expand(2, -1, -1, -1), mask)[1])


def test_neighbouring_timesteps_differ_in_bfloat16_too():
    model = small_model().bfloat16()
    x, y = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 1, 3, 16)
    outputs = [model(x, torch.tensor([t]), y) for t in (900.0, 901.0)]
    assert not torch.equal(*outputs)


def test_the_forward_pass_draws_no_random_number():
    model = small_model(class_dropout_prob=0.5)
    state = torch.get_rng_state()
    model.train()(torch.randn(1, 4, 1, 4, 4, generator=torch.Generator()), torch.tensor([1.0]), torch.ones(1, 1, 3, 16))
    assert torch.equal(state, torch.get_rng_state())


def test_initial_weights_are_those_of_the_published_recipe():
    model = create_model("stdit-ti/2", caption_channels=512)
    zero = ("bias", "attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
    for name, parameter in model.named_parameters():
        assert (parameter.abs().max() == 0) == (name.endswith(zero) and name != "x_embedder.proj.bias"), name
    assert model.t_block[1].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.y_embedder.y_proj.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    qkv = model.blocks[0].attn.qkv.weight
    assert qkv.abs().max().item() == pytest.approx((6 / (192 + 576)) ** 0.5, rel=0.01)
    patch = model.x_embedder.proj.weight
    assert patch.abs().max().item() == pytest.approx((6 / (192 + 16)) ** 0.5, rel=0.05)
    assert model.blocks[0].scale_shift_table.std().item() == pytest.approx(192**-0.5, rel=0.1)


def test_the_large_preset_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = create_model("stdit-xl/2")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(760e6, rel=0.005)


def test_published_weights_of_other_shapes_are_made_to_fit():
    model = small_model()
    state = dict(small_model().state_dict())
    state["pos_embed"], state["pos_embed_temporal"] = torch.zeros(1, 4, 48), torch.zeros(1, 2, 48)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    state["y_embedder.y_embedding"] = torch.arange(12.0)[:, None].expand(12, 16)
    model.load_state_dict(state)
    assert model.y_embedder.y_embedding[:, 0].tolist() == list(range(9))
    own = model.y_embedder.y_embedding.clone()
    state["y_embedder.y_embedding"] = torch.full((4, 16), -1.0)
    model.load_state_dict(state)
    assert torch.equal(model.y_embedder.y_embedding, torch.cat([torch.full((4, 16), -1.0), own[4:]]))


def test_unknown_models_and_settings_name_the_choices():
    with pytest.raises(InputError, match="unknown model 'dit': choose from stdit-xl/2, stdit-s/2, stdit-ti/2"):
        create_model("dit")
    with pytest.raises(InputError, match=r"unknown model setting 'width': choose from .*hidden_size"):
        create_model("stdit-ti/2", width=3)
    with pytest.raises(InputError, match="depth='two': expected a value like 6"):
        create_model("stdit-ti/2", depth="two")
    with pytest.raises(InputError, match="multiple of num_heads=3"):
        create_model("stdit-ti/2", hidden_size=200)


@pytest.mark.parametrize("pred_sigma", [True, False])
def test_counted_operations_are_those_that_torch_counts(pred_sigma):
    model = small_model(attention_backend="math", pred_sigma=pred_sigma, mlp_ratio=3.0)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # which FlopCounterMode counts on every device
        model(torch.randn(1, 4, 3, 4, 6), torch.tensor([5.0]), torch.randn(1, 1, 7, 16))
    counted = stdit_forward_flop(model.config, num_frames=3, frame_tokens=6, caption_tokens=7)
    assert counted == counter.get_total_flops()


def test_operations_of_the_published_sizes_agree_with_known_figures():
    with torch.device("meta"):
        config = create_model("stdit-xl/2").config
    per_token = stdit_training_flop(config, num_frames=16, frame_tokens=256, caption_tokens=120) / (16 * 256)
    assert per_token == pytest.approx(4.18e9, rel=0.02)
