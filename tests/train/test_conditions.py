"""What a model is told beside the latents."""

import pytest
import torch

from train.conditions import Conditions, denoiser, draw_frame_mask
from train.data import Batch
from train.diffusion.frame_masks import parse_mask_ratios


def batch_of(keys: list[int]) -> Batch:
    size = len(keys)
    return Batch(
        latents=torch.zeros(size, 4, 6, 2, 2),
        u=torch.zeros(size, dtype=torch.float64),
        noise_keys=torch.tensor(keys),
        captions=torch.ones(size, 1, 3, 5),
        mask=torch.ones(size, 3, dtype=torch.int64),
        drop_caption=torch.zeros(size, dtype=torch.bool),
        fps=torch.full((size,), 24.0),
        height=torch.full((size,), 16.0),
        width=torch.full((size,), 32.0),
        identity=torch.zeros(size, 2, dtype=torch.int64),
    )


def test_a_model_that_wants_sizes_is_told_all_and_another_nothing_that_it_does_not_take():
    batch, mask = batch_of([1, 2]), torch.ones(2, 6, dtype=torch.bool)
    calls = []

    def model(*args, **named):
        calls.append((args, named))
        return args[0] + 1

    x, timestep = torch.zeros(2, 4, 6, 2, 2), torch.tensor([3.0, 4.0])
    found = denoiser(model, Conditions.of_batch(batch, mask), wants_size=True)(x, timestep)
    assert torch.equal(found, x + 1)
    args, named = calls[0]
    assert all(a is b for a, b in zip(args, (x, timestep, batch.captions, batch.mask), strict=True))
    expected = {"drop_caption": batch.drop_caption, "fps": batch.fps, "height": batch.height, "width": batch.width}
    assert named.keys() == (expected | {"x_mask": mask}).keys()
    assert all(named[name] is value for name, value in (expected | {"x_mask": mask}).items())
    denoiser(model, Conditions.of_batch(batch), wants_size=False)(x, timestep)
    assert calls[1][1].keys() == {"drop_caption"}
    with pytest.raises(AssertionError):
        denoiser(model, Conditions.of_batch(batch, mask), wants_size=False)


def test_a_samples_frame_mask_does_not_depend_on_the_batch_that_it_is_in():
    ratios = parse_mask_ratios(["quarter_random=0.5", "random=0.5"])
    keys = list(range(40))
    together = draw_frame_mask(batch_of(keys), ratios)
    assert together.shape == (40, 6)
    assert together.dtype is torch.bool
    apart = torch.cat([draw_frame_mask(batch_of(part), ratios) for part in (keys[:7], keys[7:])])
    assert torch.equal(together, apart)
    assert len({tuple(row.tolist()) for row in together}) > 8
