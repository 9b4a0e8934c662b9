"""Names must never change: what is encoded under them would be encoded again."""

import hashlib
import json

import pyarrow as pa
import pytest

from shared.cache.identity import identity_numbers, identity_texts, latent_id, latent_numbers
from shared.media.clip import TimeRange
from shared.spec import Bucket

BUCKET = Bucket(16, 256, 448)
SOURCES = ["a.mp4", 'näht "quoted" \\ 3.mp4', "new\nline\x1f\x7f.mp4", "", "鳥.mp4"]


def test_the_middle_of_a_whole_clip_has_the_name_that_it_always_had() -> None:
    named = latent_id(source="clips/näht 3.mp4", source_version="123-abc", bucket=BUCKET, frame_interval=2)
    assert named == "ebb8e2b169c70f8718834e5cb814f1e7"


def test_time_range_rate_window_and_flip_make_other_names() -> None:
    plain = {"source": "a", "source_version": "1", "bucket": BUCKET, "frame_interval": 1}
    further: list[dict[str, object]] = [
        {},
        {"window": 7},
        {"window": 8},
        {"window": 7, "flip": True},
        {"window": 7, "fps": 8.0},
        {"window": 7, "time_range": TimeRange(start=1.0)},
        {"window": 7, "time_range": TimeRange(start=1.0, end=2.0)},
    ]
    assert len({latent_id(**plain, **more) for more in further}) == len(further)  # type: ignore[arg-type]
    text = json.dumps(["latent", 1, "a", "1", "16x256x448", 1, [1.0, None], None, 7, False], separators=(",", ":"))
    assert latent_id(**plain, **further[5]) == hashlib.sha256(text.encode()).hexdigest()[:32]  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [None, [",null,8.0,3,true", "", ",[0.5,null],null,0,false", "", ""]])
def test_names_made_many_at_a_time_are_those_made_one_at_a_time(more: list[str] | None) -> None:
    numbers = latent_numbers(
        sources=pa.array(SOURCES),
        source_versions=pa.array([f'"{n}"' if n == 1 else str(n) for n in range(len(SOURCES))]),
        bucket=BUCKET,
        frame_interval=3,
        more=None if more is None else pa.array(more),
    )
    one_by_one = [
        latent_id(
            source=source,
            source_version=f'"{n}"' if n == 1 else str(n),
            bucket=BUCKET,
            frame_interval=3,
            **({} if not more or not more[n] else [{"fps": 8.0, "window": 3, "flip": True}, {}, _RANGED][n]),  # type: ignore[arg-type]
        )
        for n, source in enumerate(SOURCES)
    ]
    assert identity_texts(numbers) == one_by_one
    assert (identity_numbers(one_by_one) == numbers).all()


_RANGED = {"time_range": TimeRange(start=0.5), "window": 0}
