"""Operations counted from the configuration are those that torch counts as they are computed."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.train.small_models import KINDS, inputs, one_of, small_model
from train.model import model_config
from train.model.flops import forward_flop, training_flop


@pytest.mark.parametrize("options", [{}, {"pred_sigma": False, "mlp_ratio": 3.0}])
@pytest.mark.parametrize("kind", KINDS)
def test_counted_operations_are_those_that_torch_counts(kind, options):
    model = small_model(kind, attention_backend="math", **options)
    values = one_of(inputs(kind, size=(3, 4, 6)), 0)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # which FlopCounterMode counts on every device
        model(**values)
    frames = values["x"].shape[2]
    counted = forward_flop(model.config, num_frames=frames, frame_tokens=6, caption_tokens=9)
    assert counted.total == counter.get_total_flops()
    products = counter.get_flop_counts()["Global"]
    assert counted.attention == products[torch.ops.aten.bmm]


@pytest.mark.parametrize(
    ("name", "frames", "tokens", "giga"),
    [
        ("stdit-xl/2", 16, 256, 4.18),
        ("stdit-xl/2", 16, 1024, 4.47),
        ("stdit-xl/2", 64, 1024, 4.48),
        ("stdit-xl/2", 256, 1024, 4.56),
        ("dit-xl/2", 16, 256, 4.77),
        ("dit-xl/2", 16, 1024, 9.51),
        ("dit-xl/2", 64, 1024, 28.5),
        ("dit-xl/2", 256, 1024, 104.6),
    ],
)
def test_operations_of_the_published_sizes_agree_with_known_figures(name, frames, tokens, giga):
    counted = training_flop(model_config(name), num_frames=frames, frame_tokens=tokens, caption_tokens=120)
    assert counted / (frames * tokens) == pytest.approx(giga * 1e9, rel=0.02)
