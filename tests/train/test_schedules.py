"""The learning rate of each step."""

import pytest

from train.config import OptimiserOptions
from train.schedules import learning_rate


def rates(num_steps: int, decay_steps: int, **options) -> list[float]:
    return [learning_rate(step, OptimiserOptions(**options), decay_steps) for step in range(num_steps)]


def test_the_learning_rate_rises_linearly_and_stays():
    assert rates(5, 5, lr=4.0, warmup_steps=3) == [1.0, 2.0, 3.0, 4.0, 4.0]


def test_a_linear_fall_ends_at_the_final_rate_and_stays_there():
    falling = rates(7, 6, lr=5.0, warmup_steps=1, lr_schedule="linear", final_lr=1.0)
    assert falling == pytest.approx([2.5, 5.0, 4.2, 3.4, 2.6, 1.8, 1.0])
    assert rates(9, 6, lr=5.0, warmup_steps=1, lr_schedule="linear", final_lr=1.0)[-1] == 1.0


def test_a_cosine_fall_is_flat_at_both_ends_and_half_way_in_the_middle():
    falling = rates(101, 100, lr=2.0, lr_schedule="cosine")
    assert falling[0] == 2.0
    assert falling[50] == pytest.approx(1.0)
    assert falling[100] == pytest.approx(0.0)
    assert falling[0] - falling[1] < 0.001 > falling[99] - falling[100]
    assert falling == sorted(falling, reverse=True)
