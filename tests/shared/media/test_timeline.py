"""Which frames windows and time ranges take, by arithmetic."""

import itertools
import math
from fractions import Fraction

import pytest

from shared.media.clip import TimeRange, Window
from shared.media.timeline import Timeline

FILM = Timeline(times=range(0, 240_000, 1001), end=240_240, tick=Fraction(1, 24_000))
"""240 frames at 23.976 a second, exactly."""
ROUNDED = Timeline(times=[round(1000 * n / 30) for n in range(90)], end=3000, tick=Fraction(1, 1000))
"""90 frames at 30 a second, as Matroska keeps them."""


def test_a_rate_that_the_clip_has_takes_every_frame_once() -> None:
    assert FILM.taken(Window(start=0, num_frames=240, fps=24000 / 1001)) == list(FILM.times)
    assert FILM.taken(Window(start=7, num_frames=100, fps=23.976)) == list(FILM.times)[7:107]
    assert ROUNDED.taken(Window(start=0, num_frames=90, fps=30)) == list(ROUNDED.times)


def test_half_the_rate_takes_every_other_frame_though_times_are_rounded() -> None:
    assert ROUNDED.taken(Window(start=0, num_frames=45, fps=15)) == list(ROUNDED.times)[::2]


def test_a_higher_rate_takes_frames_several_times() -> None:
    assert ROUNDED.taken(Window(start=0, num_frames=180, fps=60)) == [time for time in ROUNDED.times for _ in range(2)]


def test_as_many_moments_exist_as_fit_before_the_end() -> None:
    assert FILM.duration == Fraction(1001, 100)
    assert FILM.taken(Window(start=0, num_frames=101, fps=10)) is not None  # the last at 10.00 of 10.01 s
    assert FILM.taken(Window(start=0, num_frames=102, fps=10)) is None
    assert ROUNDED.taken(Window(start=0, num_frames=30, fps=10)) is not None
    assert ROUNDED.taken(Window(start=0, num_frames=31, fps=10)) is None


def test_neighbouring_ranges_share_no_frame_and_lose_none() -> None:
    for timeline in (FILM, ROUNDED):
        bounds = [0.0, 0.1, 0.333, 1 / 3, 0.5, 1.001, 2.0, 2.9, math.inf]
        parts = [timeline.part(TimeRange(start=start, end=end)) for start, end in itertools.pairwise(bounds)]
        assert [time for part in parts for time in part.times] == list(timeline.times)
        assert sum(part.duration for part in parts) == pytest.approx(float(timeline.duration), abs=0.34)


def test_a_ranges_duration_ends_with_it() -> None:
    part = ROUNDED.part(TimeRange(start=0.5, end=1.0))
    assert (len(part.times), float(part.duration)) == (15, 0.5)
    assert float(ROUNDED.part(TimeRange(start=2.5, end=9.0)).duration) == 0.5
    assert float(ROUNDED.part(TimeRange(start=2.5)).duration) == 0.5
    nothing = ROUNDED.part(TimeRange(start=5.0, end=6.0))
    assert (len(nothing.times), nothing.duration) == (0, 0)
    assert nothing.taken(Window(start=0, num_frames=1)) is None
    assert nothing.taken(Window(start=0, num_frames=1, fps=1)) is None


def test_a_moment_that_a_manifest_rounds_to_milliseconds_finds_its_frame() -> None:
    thirds = Timeline(times=range(90), end=90, tick=Fraction(1, 30))
    assert thirds.part(TimeRange(start=0.033, end=0.067)).times == range(1, 2)
    assert thirds.part(TimeRange(start=0.067, end=0.1)).times == range(2, 3)


def test_the_mean_rate_is_that_between_the_first_and_the_last_frame() -> None:
    assert FILM.mean_rate == Fraction(24000, 1001)
    assert Timeline(times=[5], end=6, tick=Fraction(1)).mean_rate is None
