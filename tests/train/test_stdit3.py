"""STDiT3's own conditions: given frames, frame rate, sizes."""

import pytest
import torch

from shared.errors import InputError
from tests.train.small_models import inputs, one_of, small_model
from train.model import create_model
from train.model.positions import scaled_positions, sincos

KIND = "stdit3-ti/2"


def test_all_frames_generated_is_the_same_as_no_frame_mask():
    model, values = small_model(KIND), inputs(KIND)
    torch.testing.assert_close(model(**values, x_mask=torch.ones(2, 2, dtype=torch.bool)), model(**values))


def test_all_frames_given_is_the_same_as_timestep_zero():
    model, values = small_model(KIND), inputs(KIND)
    given = model(**values, x_mask=torch.zeros(2, 2, dtype=torch.bool))
    torch.testing.assert_close(given, model(**values | {"timestep": torch.zeros(2)}))


def test_the_timestep_reaches_the_frames_that_are_generated_alone():
    model, values = small_model(KIND), inputs(KIND, size=(3, 4, 4), batch=1)
    for block in model.temporal_blocks:  # so that no frame sees another
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
    x_mask = torch.tensor([[False, True, False]])
    early, late = (model(**values | {"timestep": torch.tensor([t])}, x_mask=x_mask) for t in (10.0, 900.0))
    changes = (early - late).abs().amax(dim=(0, 1, 3, 4))
    assert changes[0] == changes[2] == 0
    assert changes[1] > 1e-3


def test_each_sample_has_its_own_frame_mask():
    model, values = small_model(KIND), inputs(KIND)
    x_mask = torch.tensor([[False, True], [True, False]])
    together = model(**values, x_mask=x_mask)
    for row in range(2):
        alone = model(**one_of(values, row), x_mask=x_mask[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_frame_mask_of_another_length_is_refused():
    with pytest.raises(InputError, match="x_mask of 3 frames for latents of 2: give one value a frame"):
        small_model(KIND)(**inputs(KIND), x_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="x_mask: patches of 2 frames cannot be given in part"):
        small_model(KIND, patch_size=(2, 2, 2))(**inputs(KIND), x_mask=torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("name", ["fps", "height", "width"])
def test_rate_and_size_are_required_and_have_an_effect(name):
    model, values = small_model(KIND), inputs(KIND)
    other = model(**values | {name: values[name] * 3})
    assert (other - model(**values)).abs().max() > 1e-3
    with pytest.raises(InputError, match="fps, height and width: give all three"):
        model(**values | {name: None})


def test_time_attention_tells_the_order_of_frames():
    model, values = small_model(KIND), inputs(KIND, size=(4, 2, 2), batch=1)
    reordered = [2, 0, 3, 1]
    output = model(**values | {"x": values["x"][:, :, reordered]})
    assert (output - model(**values)[:, :, reordered]).abs().max() > 1e-4


def test_positions_of_a_frame_follow_its_aspect_and_its_size():
    positions = scaled_positions(16, 2, 8, torch.tensor([1.0, 0.5]))
    for row, side in enumerate((1.0, 0.5)):  # base size 4: a row is 2 units, a column half of one
        columns, rows = (torch.arange(8) * 0.5 / side).double(), (torch.arange(2) * 2 / side).double()
        expected = torch.cat([sincos(8, columns).repeat(2, 1), sincos(8, rows).repeat_interleave(8, 0)], dim=1)
        torch.testing.assert_close(positions[row].double(), expected, atol=1e-5, rtol=0)


def test_initial_weights_are_those_of_the_published_recipe():
    model = create_model(KIND, caption_channels=64, depth=2)
    zero = {"fps_embedder.mlp.2.weight"} | {
        f"temporal_blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.proj", "cross_attn.proj", "mlp.fc2")
    }
    for name, parameter in model.named_parameters():
        is_bias = name.endswith("bias") and name != "x_embedder.proj.bias"
        assert (parameter.abs().max() == 0) == (name in zero or is_bias), name
    assert model.spatial_blocks[0].attn.q_norm.weight.eq(1).all()
    assert model.fps_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.t_embedder.mlp[0].weight.abs().max().item() == pytest.approx((6 / (256 + 192)) ** 0.5, rel=0.01)


def test_without_qk_norm_there_are_no_such_weights():
    names = dict(small_model(KIND, qk_norm=False).named_parameters())
    assert not [name for name in names if "_norm" in name]
    assert small_model(KIND, qk_norm=False)(**inputs(KIND)).isfinite().all()
