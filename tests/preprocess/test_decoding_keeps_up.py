"""Cores are kept full, and a GPU waits only where they are too few: one worker's shards, simulated on a clock."""

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from preprocess.decode_ahead import DecodeAhead, Pending, TaskDiedError, frame_bytes
from preprocess.job.pool import Member
from shared.clips.decode import Frames
from shared.clips.plan import SampleTask, ShardTask
from shared.media.clip import Media, Window
from shared.spec import Bucket

NUM_SHARDS = 14
DECODE_BYTES = 2048 << 20
HAND_OUT = 0.5
"""Seconds until the driver sees that a shard is done."""
FRAMES = np.zeros((1, 1, 1, 3), np.uint8)


@dataclass
class Cores:
    """CPU cores that decode what they are given, in its order."""

    count: int
    decode: float
    """Seconds a clip."""
    now: float = 0.0
    waited: float = 0.0
    """By who takes the frames."""
    free: list[float] = field(default_factory=list)
    num_submitted: int = 0
    most_bytes: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self.free = [0.0] * self.count

    def submit(self, samples: Sequence[SampleTask], bucket: Bucket) -> Pending:
        start = max(self.now, heapq.heappop(self.free))
        heapq.heappush(self.free, start + len(samples) * self.decode)
        self.num_submitted += len(samples)
        self.bytes += len(samples) * frame_bytes(bucket)
        self.most_bytes = max(self.most_bytes, self.bytes)
        return _Task(self, [start + (number + 1) * self.decode for number in range(len(samples))], bucket)

    @property
    def busy(self) -> float:
        """Part of the cores' time so far in which they decoded."""
        ahead = sum(max(free - self.now, 0.0) for free in self.free)
        return (self.num_submitted * self.decode - ahead) / (self.count * self.now)


class _Task:
    def __init__(self, cores: Cores, ready: list[float], bucket: Bucket) -> None:
        self._cores, self._ready, self._bucket = cores, deque(ready), bucket

    def next(self) -> Frames:
        cores, ready = self._cores, self._ready.popleft()
        cores.waited += max(0.0, ready - cores.now)
        cores.now = max(cores.now, ready)
        cores.bytes -= frame_bytes(self._bucket)
        return FRAMES


def _give_up(sample: SampleTask, bucket: Bucket, error: TaskDiedError) -> Frames:
    raise AssertionError


def _shard(number: int, size: int, bucket: Bucket) -> ShardTask:
    samples = tuple(
        SampleTask(
            sample=f"{number}-{place}",
            source=f"{number}-{place}.mp4",
            source_version="1",
            media=Media(url=f"/clips/{number}-{place}.mp4"),
            time_range=None,
            captions=("a clip",),
            window=Window(start=0, num_frames=bucket.num_frames),
            is_centre=True,
            fps=8.0,
        )
        for place in range(size)
    )
    return ShardTask(shard_id=str(number), bucket=bucket, samples=samples)


def _run(cores: Cores, bucket: Bucket, encode: float, commit: float, size: int = 64) -> None:
    """Encodes all shards of ``size`` samples: ``encode`` seconds a sample, and ``commit`` a shard, beside the next."""
    ahead = DecodeAhead(cores.submit, _give_up, DECODE_BYTES)
    member = Member(name="both-1", actor=None, role="both", avoided=frozenset(), waiting=None)
    shards = deque(_shard(number, size, bucket) for number in range(NUM_SHARDS))
    at_hand: deque[tuple[str, Iterator[Frames]]] = deque()
    committing: deque[tuple[float, str]] = deque()

    def hand_out() -> None:
        while committing and committing[0][0] <= cores.now:
            del member.running[committing.popleft()[1]]
        while shards and member.has_room(DECODE_BYTES):
            shard = shards.popleft()
            member.running[shard.shard_id] = size * frame_bytes(bucket)
            at_hand.append((shard.shard_id, ahead.open(shard)))

    hand_out()
    while at_hand:
        name, frames = at_hand.popleft()
        for _ in frames:
            cores.now += encode
            hand_out()
        committing.append((cores.now + commit + HAND_OUT, name))
        if shards and not at_hand:
            cores.waited += max(0.0, committing[0][0] - cores.now)
            cores.now = max(cores.now, committing[0][0])
        hand_out()


@pytest.mark.parametrize(
    ("size", "cores", "decode", "encode", "samples"),
    [
        ("16x256x256", 16, 0.15, 0.0108, 64),  # 107 samples/s against 93
        ("16x256x256", 32, 0.30, 0.0108, 64),
        ("1x256x256", 4, 0.004, 0.0012, 1000),  # images: 1000 samples/s against 833
        ("64x512x512", 16, 1.4, 0.15, 64),  # 11 samples/s against 6.7
        ("64x512x512", 12, 1.6, 0.15, 64),
    ],
)
def test_a_gpu_does_not_wait_where_the_cores_suffice(
    size: str, cores: int, decode: float, encode: float, samples: int
) -> None:
    decoders, bucket = Cores(cores, decode), Bucket.parse(size)
    _run(decoders, bucket, encode, commit=1.0, size=samples)
    first = decode * 4  # until the first frames come
    assert decoders.waited - first < 0.01 * decoders.now, (decoders.waited, decoders.now)
    assert decoders.most_bytes <= DECODE_BYTES + 64 * 2**20


@pytest.mark.parametrize(
    ("size", "cores", "decode", "encode"),
    [
        ("16x256x256", 16, 0.25, 0.0108),  # 64 samples/s against 93
        ("16x256x256", 48, 0.60, 0.0108),
        ("64x512x512", 16, 3.2, 0.15),  # 5 samples/s against 6.7
    ],
)
def test_all_cores_decode_where_they_do_not_suffice(size: str, cores: int, decode: float, encode: float) -> None:
    decoders, bucket = Cores(cores, decode), Bucket.parse(size)
    _run(decoders, bucket, encode, commit=1.0)
    # the first and the last tasks leave some cores idle
    assert decoders.busy > 1 - 8 * decode / decoders.now, (decoders.busy, decoders.now)
