"""When a worker counts as stuck."""

import pytest

from preprocess.liveness import Limits, Liveness
from preprocess.messages import Activity, Pulse

LIMITS = Limits(worker_seconds=100.0, frame_seconds=300.0, load_seconds=500.0)


def beat(worker: Liveness, activity: Activity, steps: int, now: float) -> None:
    """Lets a worker answer."""
    worker.note(Pulse(activity=activity, num_steps=steps), now)


def test_a_worker_that_takes_steps_is_never_stuck_however_long_its_shard_takes() -> None:
    worker = Liveness(LIMITS, 0.0)
    for number in range(100):
        now = 90.0 * number
        beat(worker, "encoding", number, now)
        assert worker.stuck(now + 89.0) is None


def test_a_worker_that_does_not_answer_is_stuck() -> None:
    worker = Liveness(LIMITS, 0.0)
    beat(worker, "idle", 0, 10.0)
    assert worker.stuck(110.0) is None
    found = worker.stuck(111.0)
    assert found is not None
    assert found.kind == "worker"
    assert "no answer for 101 s" in found.detail


@pytest.mark.parametrize(
    ("activity", "limit", "kind"),
    [("encoding", 100.0, "worker"), ("loading", 500.0, "worker"), ("waiting", 300.0, "frames")],
)
def test_a_worker_that_answers_and_gets_nowhere_is_stuck_after_the_limit_of_what_it_does(
    activity: Activity, limit: float, kind: str
) -> None:
    worker = Liveness(LIMITS, 0.0)
    for now in range(0, int(limit) + 1, 10):
        beat(worker, activity, 7, float(now))
        assert worker.stuck(float(now)) is None
    beat(worker, activity, 7, limit + 1)
    found = worker.stuck(limit + 1)
    assert found is not None
    assert found.kind == kind


def test_an_idle_worker_is_never_stuck_and_begins_anew_with_its_next_shard() -> None:
    worker = Liveness(LIMITS, 0.0)
    for now in range(0, 1000, 10):
        beat(worker, "idle", 7, float(now))
    beat(worker, "encoding", 7, 1000.0)
    assert worker.stuck(1090.0) is None
    beat(worker, "encoding", 7, 1090.0)
    assert worker.stuck(1101.0) is not None
