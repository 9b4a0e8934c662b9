"""Rectified flow against closed forms."""

import math
from statistics import NormalDist

import pytest
import torch

from shared.errors import InputError
from train.diffusion import rectified_flow
from train.diffusion.terms import GivenFrames

SHAPE = (3, 2, 5, 4, 4)


def draw(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(SHAPE, generator=generator, dtype=torch.float64) for name in names}


def test_logit_normal_times_have_the_quantiles_of_a_sigmoid_of_normal_numbers():
    u = torch.tensor([0.0, 0.01, 0.25, 0.5, 0.9, 1 - 2.0**-53], dtype=torch.float64)
    times = rectified_flow.times_at(u, "logit-normal")
    expected = [0.0] + [1 / (1 + math.exp(-NormalDist().inv_cdf(p))) for p in u[1:].tolist()]
    torch.testing.assert_close(times, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(rectified_flow.times_at(u, "uniform"), u)


def test_times_are_shifted_as_published():
    """By hand: a clip of 51 frames of 720x1280 is 15 latent frames of v1.2's autoencoder."""
    ratio = rectified_flow.shift_ratio(720 * 1280, 15)
    assert ratio == pytest.approx(math.sqrt(720 * 1280 / 512**2) * math.sqrt(51 // 17 * 5))
    assert rectified_flow.shift_ratio(512 * 512, 1) == 1
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    expected = [0.0, ratio * 0.3 / (1 + (ratio - 1) * 0.3), 1.0]
    assert rectified_flow.shift_times(times, ratio).tolist() == pytest.approx(expected)
    assert torch.equal(rectified_flow.shift_times(times, 1.0), times)


def test_a_shift_keeps_the_signal_to_noise_ratio_of_values_that_are_repeated_r_squared_times():
    """The mean of n equal pixels with noise has a noise smaller by the root of n (arXiv 2403.03206, 5.3.2)."""
    t, n = torch.tensor([0.4], dtype=torch.float64), 9
    shifted = rectified_flow.shift_times(t, math.sqrt(n)).item()
    assert shifted / (1 - shifted) / math.sqrt(n) == pytest.approx(0.4 / 0.6)


def test_the_loss_is_the_error_of_the_velocity_on_the_straight_line():
    values = draw("x0", "noise", "answer")
    time = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    seen = []

    def denoise(x, timestep):
        seen.append((x, timestep))
        return torch.cat([values["answer"], torch.full_like(x, 7.0)], dim=1)

    terms = rectified_flow.training_loss(denoise, values["x0"], time, values["noise"])
    (x_t, told), x0, noise = seen[0], values["x0"], values["noise"]
    torch.testing.assert_close(x_t, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]]))
    assert (told.dtype, told.tolist()) == (torch.float32, [0.0, 250.0, 1000.0])
    expected = [(values["answer"][i] - x0[i] + noise[i]).pow(2).mean() for i in range(3)]
    torch.testing.assert_close(terms.loss, torch.stack(expected))


def test_given_frames_get_no_noise_and_count_in_no_loss():
    values = draw("x0", "noise", "answer")
    mask = torch.tensor([[False, True, True, True, True], [True] * 5, [False, False, True, False, True]])
    time = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    seen = []

    def denoise(x, timestep):
        seen.append(x)
        return values["answer"]

    terms = rectified_flow.training_loss(denoise, values["x0"], time, values["noise"], mask)
    whole = rectified_flow.add_noise(values["x0"], time, values["noise"])
    for i in range(3):
        assert torch.equal(seen[0][i][:, mask[i]], whole[i][:, mask[i]])
        assert torch.equal(seen[0][i][:, ~mask[i]], values["x0"][i][:, ~mask[i]])
        error = values["answer"][i] - values["x0"][i] + values["noise"][i]
        torch.testing.assert_close(terms.loss[i], error[:, mask[i]].pow(2).mean())


def oracle(x0: torch.Tensor):
    """A model that knows x0: the velocity of the line through it and x."""
    return lambda x, timestep: (x0 - x) / (timestep.to(x.dtype) / 1000).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize(("steps", "ratio"), [(1, 1.0), (7, 3.5), (30, 0.4)])
def test_eulers_steps_with_a_model_that_knows_the_answer_give_the_answer(steps, ratio):
    values = draw("x0", "x")
    times = rectified_flow.sampling_times(steps, ratio)
    assert (len(times), times[0], times[-1]) == (steps + 1, 1, 0)
    found = rectified_flow.sample_euler(times, oracle(values["x0"]), values["x"])
    torch.testing.assert_close(found, values["x0"], atol=1e-5, rtol=1e-5)  # timesteps are float32


def test_eulers_steps_are_those_of_a_sum_by_hand_and_keep_given_frames():
    values = draw("x", "given")
    mask = torch.tensor([[False, True, True, True, False]]).expand(3, -1)
    times = rectified_flow.sampling_times(4, 2.0)
    seen = []

    def denoise(x, timestep):
        seen.append(x.clone())
        return 3 * x + timestep.to(x.dtype).view(-1, 1, 1, 1, 1) / 1000

    found = rectified_flow.sample_euler(
        times, denoise, values["x"], GivenFrames(latents=values["given"], frame_mask=mask)
    )
    x = values["x"].clone()
    for t, later in ((1.0, 6 / 7), (6 / 7, 2 / 3), (2 / 3, 0.4), (0.4, 0.0)):  # 2t / (1 + t) at 1, 3/4, 1/2, 1/4
        x = x + (t - later) * (3 * x + t)
    torch.testing.assert_close(found[:, :, 1:4], x[:, :, 1:4], atol=1e-5, rtol=1e-5)
    for kept in (*seen, found):
        assert torch.equal(kept[:, :, [0, 4]], values["given"][:, :, [0, 4]])
    with pytest.raises(InputError, match="0 sampling steps: expected at least 1"):
        rectified_flow.sampling_times(0)
