"""DiT: all tokens see each other; labels."""

import pytest
import torch

from shared.errors import InputError
from tests.train.small_models import inputs, small_model
from train.model import create_model

LABELS = "dit-ti/2 of labels"


@pytest.mark.parametrize("kind", ["dit-ti/2", LABELS])
def test_every_token_sees_every_other_of_its_sample(kind):
    model, values = small_model(kind), inputs(kind)
    values["x"].requires_grad_()
    model(**values)[0, :, 0, 0, 0].square().sum().backward()
    gradients = values["x"].grad.abs().amax(1)
    assert gradients[0].min() > 0
    assert gradients[1].max() == 0


def test_frames_and_places_have_positions():
    model, values = small_model("dit-ti/2"), inputs("dit-ti/2", size=(2, 4, 4), batch=1)
    for flip in (2, 3, 4):
        if flip == 2:
            turned = values["x"].flip(2)
        else:  # whole patches change places
            turned = values["x"].unflatten(flip, (2, 2)).flip(flip).flatten(flip, flip + 1)
        output = model(**values | {"x": turned})
        straight = model(**values)
        straight = (
            straight.flip(2) if flip == 2 else straight.unflatten(flip, (2, 2)).flip(flip).flatten(flip, flip + 1)
        )
        assert (output - straight).abs().max() > 1e-3, flip


def plain_label_dit(model, x, timestep, labels):
    """The DiT of the paper, written down anew with a batch of token rows and PyTorch's own parts."""
    B, C, _, H, W = x.shape
    D, heads = model.config.hidden_size, model.config.num_heads
    patches = torch.nn.functional.conv2d(
        x[:, :, 0], model.x_embedder.proj.weight[:, :, 0], model.x_embedder.proj.bias, stride=2
    )
    rows, columns = patches.shape[2:]
    frequencies = 10_000.0 ** -(torch.arange(D // 4, dtype=torch.float64) / (D / 4))

    def one_axis(n):
        angles = torch.arange(n).double()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    grid = torch.cat([one_axis(columns).repeat(rows, 1), one_axis(rows).repeat_interleave(columns, 0)], dim=1)
    tokens = patches.flatten(2).transpose(1, 2) + grid.float()
    condition = model.t_embedder(timestep, torch.float32) + model.y_embedder.embedding_table(labels)

    def norm(tokens, shift, scale):
        return torch.nn.functional.layer_norm(tokens, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    for block in model.blocks:
        m = block.adaLN_modulation(condition).chunk(6, dim=1)
        q, k, v = block.attn.qkv(norm(tokens, m[0], m[1])).view(B, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / (D // heads) ** 0.5).softmax(-1)
        tokens = tokens + m[2][:, None] * block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + m[5][:, None] * block.mlp(norm(tokens, m[3], m[4]))
    shift, scale = model.final_layer.adaLN_modulation(condition).chunk(2, dim=1)
    values = model.final_layer.linear(norm(tokens, shift, scale)).view(B, rows, columns, 2, 2, 2 * C)
    return values.permute(0, 5, 1, 3, 2, 4).reshape(B, 2 * C, 1, H, W)


def test_the_model_of_labels_is_the_one_of_the_paper():
    model, values = small_model(LABELS), inputs(LABELS, size=(1, 4, 6), batch=3)
    expected = plain_label_dit(model, values["x"], values["timestep"], values["y"])
    torch.testing.assert_close(model(**values), expected, atol=1e-5, rtol=1e-5)


def test_a_dropped_label_is_the_row_after_the_last_class():
    model, values = small_model(LABELS), inputs(LABELS)
    dropped = model(**values, drop_caption=torch.tensor([True, False]))
    torch.testing.assert_close(dropped, model(**values | {"y": torch.tensor([5, 0])}))


def test_what_labels_do_not_have_is_refused():
    values = inputs(LABELS)
    with pytest.raises(InputError, match="class_dropout_prob=0: the model has no null label"):
        small_model(LABELS, class_dropout_prob=0.0)(**values, drop_caption=torch.tensor([True, False]))
    with pytest.raises(InputError, match="is for images of one frame, without a caption mask: found 2 frames"):
        small_model(LABELS)(**values | {"x": torch.zeros(2, 4, 2, 4, 4)})
    with pytest.raises(InputError, match="found 1 frames and a mask"):
        small_model(LABELS)(**values | {"mask": torch.ones(2, 9)})
    with pytest.raises(InputError, match="num_classes=0: expected at least 1, or None"):
        create_model("dit-ti/2", num_classes=0)


def test_at_first_a_model_of_labels_passes_nothing_on():
    model, values = create_model("dit-ti/2", num_classes=5, depth=1), inputs(LABELS)
    assert model(**values).abs().max() == 0
    assert model.blocks[0].adaLN_modulation[1].weight.abs().max() == 0
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx((6 / (192 + 576)) ** 0.5, rel=0.01)
