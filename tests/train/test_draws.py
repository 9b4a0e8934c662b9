"""What is drawn for a sample does not change from one version to the next: runs go on."""

import numpy as np

from train.draws import draw_samples, sample_keys
from train.permutation import uniform

IDENTITIES = np.array([[2**63 + 5, 7], [8, 9], [1, 0], [3, 2**64 - 1]], dtype=np.uint64)


def test_draws_are_those_of_the_first_version():
    keys = sample_keys(11, np.array([0, 0, 1, 5]), IDENTITIES)
    draws = draw_samples(keys, np.array([1, 2, 3, 4]), caption_dropout=0.1)
    assert draws.caption.tolist() == [0, 1, 2, 2]
    assert np.floor(draws.u * 1000).tolist() == [327, 826, 153, 910]
    assert draws.drop.tolist() == [False] * 4
    assert draws.noise_key.tolist() == [
        4693552523005969722,
        -3468062436946043371,
        -4118492469688137517,
        -2364496984805830607,
    ]


def test_uniform_draws_are_below_one_so_that_the_last_level_is_the_last():
    greatest = uniform(np.array([2**64 - 1], dtype=np.uint64))
    assert greatest < 1
    assert int(greatest[0] * 1000) == 999
