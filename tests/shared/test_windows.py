"""Which windows of a clip are taken."""

from itertools import pairwise

import numpy as np
import pytest

from shared.windows import Sampling, centre_start, num_windows, window_starts


def windows(num_places: int, span: int, most: int) -> list[int]:
    """Returns where the windows of one clip start, in the order in which they are taken."""
    places = np.array([num_places])
    count = int(num_windows(places, span, most)[0])
    return [int(window_starts(places, span, number)[0]) for number in range(count)]


@pytest.mark.parametrize("span", [1, 7, 16])
@pytest.mark.parametrize("num_places", [16, 31, 47, 48, 49, 100, 1000, 12_345])
def test_windows_lie_in_the_clip_and_do_not_overlap(num_places: int, span: int) -> None:
    starts = sorted(windows(num_places, span, 9))
    assert starts[0] >= 0
    assert starts[-1] + span <= num_places
    assert all(after - before >= span for before, after in pairwise(starts))


def test_a_clip_with_room_for_one_window_gives_the_middle() -> None:
    assert windows(16, 16, 5) == [0]
    assert windows(47, 16, 5) == [15] == [centre_start(47, 16)]


def test_a_clip_gives_as_many_windows_as_fit_around_the_middle_and_no_more_than_asked_for() -> None:
    assert [len(windows(48, 16, most)) for most in (1, 2, 3, 4)] == [1, 2, 3, 3]
    assert sorted(windows(48, 16, 9)) == [0, 16, 32]
    assert sorted(windows(80, 16, 9)) == [0, 16, 32, 48, 64]


def test_asking_for_more_windows_keeps_those_that_there_are() -> None:
    everything = windows(12_345, 16, 50)
    assert len(set(everything)) == 50
    for most in range(1, 50):
        assert windows(12_345, 16, most) == everything[:most]


@pytest.mark.parametrize("most", [3, 5, 9, 17])
def test_windows_are_spread_over_the_clip(most: int) -> None:
    starts = np.array(sorted(windows(10_000, 16, most)))
    assert starts[0] == 0
    assert starts[-1] == 10_000 - 16
    assert np.diff(starts).max() <= 1.1 * 10_000 / (most - 1)


def test_many_clips_at_once_give_what_each_gives_alone() -> None:
    places = np.random.default_rng(0).integers(16 * 9, 5000, 500)
    for number in range(5):
        alone = [windows(int(count), 16, 5)[number] for count in places]
        assert window_starts(places, 16, number).tolist() == alone


def test_frames_by_time_need_a_duration_and_not_a_number_of_frames() -> None:
    sampling = Sampling(fps=8.0)
    frames, durations = np.array([10, 300, 48, 1, 0]), np.array([2.0, 1.0, 2.0000001, 0.0, 0.0])
    places = sampling.num_places(frames, durations, np.array([False, False, False, True, False]))
    assert places.tolist() == [16, 8, 16, 1, 0]
    assert sampling.span(16) == 16


def test_frames_by_number_are_counted() -> None:
    sampling = Sampling(frame_interval=3)
    assert sampling.span(16) == 46
    assert sampling.num_places(np.array([10, 300]), np.array([9.0, 1.0]), np.array([False, False])).tolist() == [
        10,
        300,
    ]
