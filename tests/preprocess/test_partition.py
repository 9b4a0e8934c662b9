"""Parts of a manifest."""

import pytest

from preprocess.partition import Partition
from shared.errors import InputError
from shared.media.clip import TimeRange
from tests.shared.clips.planning import clip, manifest_of


def test_parts_hold_every_clip_once_and_all_ranges_of_a_file_together() -> None:
    ranges = (TimeRange(start=0.0, end=1.0), TimeRange(start=1.0, end=2.0))
    clips = [clip(f"{number}.mp4", time_range=part).clip for number in range(200) for part in ranges]
    manifest = manifest_of(clips, refused=["bad.mp4"])
    parts = [Partition(number=number, count=4).of(manifest) for number in range(1, 5)]
    sources = [{made.source for made in part.clips} for part in parts]
    assert sum(len(part.clips) for part in parts) == 400
    assert set.union(*sources) == {made.source for made in clips}
    assert sum(map(len, sources)) == 200
    assert min(map(len, sources)) > 25
    assert [len(part.refused) for part in parts] == [1, 0, 0, 0]
    assert sum(part.num_rows for part in parts) == manifest.num_rows


def test_a_clip_stays_in_its_part_when_the_manifest_grows() -> None:
    few = manifest_of([clip(f"{number}.mp4").clip for number in range(50)])
    many = manifest_of([clip(f"{number}.mp4").clip for number in reversed(range(300))])
    part = Partition(number=2, count=3)
    assert {made.source for made in part.of(few).clips} <= {made.source for made in part.of(many).clips}


def test_a_clip_is_in_the_same_part_in_every_process() -> None:
    manifest = manifest_of([clip(f"{number}.mp4").clip for number in range(8)])
    found = [made.source for made in Partition(number=1, count=2).of(manifest).clips]
    assert found == ["0.mp4", "4.mp4", "5.mp4", "6.mp4"]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected I/N with I from 1 to N"):
        Partition.parse(text)
