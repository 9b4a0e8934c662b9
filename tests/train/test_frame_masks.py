"""Which frames are given rather than made."""

import numpy as np
import pytest
import torch

from shared.errors import InputError
from train.diffusion.frame_masks import (
    NUM_DRAWS,
    STRATEGIES,
    choose_strategy,
    frame_mask,
    frame_masks,
    parse_mask_ratios,
)
from train.draws import draw_for_masks

MANY = 4000


def drawn(num_draws: int, count: int = MANY) -> np.ndarray:
    keys = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(5))
    return draw_for_masks(keys, num_draws)


def masks_of(strategy: str, num_frames: int) -> list[tuple[bool, ...]]:
    return [tuple(frame_mask(strategy, num_frames, row[1:]).tolist()) for row in drawn(NUM_DRAWS + num_frames)]


def text(mask: tuple[bool, ...]) -> str:
    return "".join(".x"[made] for made in mask)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("identity", {"xxxxxxxx"}),
        ("interpolate", {".x.x.x.x", "x.x.x.x."}),
        ("quarter_head", {".xxxxxxx", "..xxxxxx"}),
        ("quarter_tail", {"xxxxxxx.", "xxxxxx.."}),
        ("quarter_head_tail", {".xxxxxx.", "..xxxx.."}),
        ("quarter_random", {"x" * i + g + "x" * (8 - i - len(g)) for g in (".", "..") for i in range(9 - len(g))}),
        ("image_head", {".xxxxxxx"}),
        ("image_tail", {"xxxxxxx."}),
        ("image_head_tail", {".xxxxxx."}),
        ("image_random", {"x" * i + "." + "x" * (7 - i) for i in range(8)}),
    ],
)
def test_a_strategy_gives_what_its_name_says_each_possibility_as_often(strategy, expected):
    found = [text(mask) for mask in masks_of(strategy, 8)]
    assert set(found) == expected
    lengths = {mask.count(".") for mask in expected}
    for mask in expected:
        alike = sum(other.count(".") == mask.count(".") for other in expected)
        assert found.count(mask) / MANY == pytest.approx(1 / len(lengths) / alike, abs=0.03), mask


def test_random_gives_10_to_90_percent_of_the_frames():
    shares = np.array(masks_of("random", 50)).mean(1)
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert (shares < 0.35).mean() == pytest.approx(0.25 / 0.8, abs=0.04)  # uniform: a quarter of 0.1 .. 0.9
    assert np.array(masks_of("random", 50)).mean(0) == pytest.approx(np.full(50, 0.5), abs=0.05)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
def test_one_frame_at_least_is_made_of_clips_however_short(strategy, num_frames):
    for mask in masks_of(strategy, num_frames)[:500]:
        assert len(mask) == num_frames
        assert any(mask)
        if num_frames > 1 and strategy not in ("identity", "random"):
            assert not all(mask)


def test_strategies_are_taken_as_often_as_their_ratios_say_and_the_rest_is_whole():
    ratios = parse_mask_ratios(["image_head=0.2", "quarter_tail=0.1", "intepolate=0.05"])
    assert ratios == {"image_head": 0.2, "quarter_tail": 0.1, "interpolate": 0.05, "identity": pytest.approx(0.65)}
    chosen = [choose_strategy(ratios, row[0]) for row in drawn(1)]
    for strategy, ratio in ratios.items():
        assert chosen.count(strategy) / MANY == pytest.approx(ratio, abs=0.025)
    masks = frame_masks(ratios, 8, drawn(NUM_DRAWS + 8))
    assert masks.shape == (MANY, 8)
    assert masks.all(1).mean() == pytest.approx(0.65, abs=0.025)
    assert (~masks[:, 0] & masks[:, 1:].all(1)).mean() == pytest.approx(0.2, abs=0.025)
    assert choose_strategy({"random": 0.7, "identity": 0.3 - 1e-12}, 1 - 1e-16) == "identity"


def test_masks_depend_on_the_sample_alone_and_not_on_its_noise():
    keys = torch.tensor([3, -7, 3])
    draws = draw_for_masks(keys, 5)
    assert draws.dtype == np.float64
    assert np.array_equal(draws[0], draws[2])
    assert len(np.unique(draws)) == 10
    assert np.array_equal(draws[1:2], draw_for_masks(keys[1:2], 5))
    assert np.array_equal(draws[:, :3], draw_for_masks(keys, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["head=0.1"], "unknown strategy 'head': choose from identity, random"),
        (["random"], "'random': expected STRATEGY=RATIO with a ratio of 0 to 1"),
        (["random=1.5"], "'random=1.5': expected STRATEGY=RATIO"),
        (["random=0.1", "random=0.2"], "random is given twice"),
        (["random=0.7", "image_head=0.6"], "they add up to 1.3: expected at most 1"),
        (["random=0.7", "identity=0.1"], "they add up to 0.8: expected 1"),
    ],
)
def test_ratios_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        parse_mask_ratios(settings)
