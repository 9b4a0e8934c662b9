"""Samples of clips of every length."""

from pathlib import Path

import pytest

from shared.clips.samples import SampleMaker, find_samples
from shared.spec import Bucket
from shared.windows import Sampling
from tests.shared.clips.planning import clip, manifest_of, probes_of


@pytest.mark.parametrize("seconds", [1e3, 1e9, 1e15])
def test_windows_of_a_clip_that_claims_any_length_start_where_32_bits_can_tell(tmp_path: Path, seconds: float) -> None:
    made = clip("a", duration=seconds)
    manifest = manifest_of([made.clip])
    maker = SampleMaker(manifest, probes_of(tmp_path, manifest, [made]), Sampling(fps=30.0))
    buckets = [Bucket.parse("16x256x256")]
    found = find_samples(maker, buckets, per_clip="best", windows_per_clip=3, flip=False, rows=None)
    (starts,) = found.by_bucket[0].starts.tolist()
    places = min(int(seconds * 30), 2**31 - 1)
    assert starts == [(places - 16) // 2, starts[1], starts[2]]
    assert 0 <= starts[1] < starts[0] < starts[2] <= places - 16
