"""Processes for work that may crash or hang."""

from fractions import Fraction

import numpy as np
import pytest

from shared.clips.probes import FileToProbe
from shared.errors import InputError
from shared.media.clip import Media
from tests.train.online import hostile_work
from train.online.pool import ProcessPool, TaskDiedError
from train.online.probing import _clips

FACTS = {
    "version": "1",
    "num_frames": 7,
    "height": 48,
    "width": 64,
    "fps": [30000, 1001],
    "duration": 0.23,
    "rotation": 0,
    "is_image": False,
    "codec": "h264",
}


def test_what_crashes_hangs_or_fails_costs_one_task_and_the_others_are_done(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ".")  # where the workers find this folder's modules
    with ProcessPool(num_workers=2, timeout_seconds=2) as pool:
        doubled = [pool.submit(hostile_work.double, number) for number in range(20)]
        hanging = pool.submit(hostile_work.hang, 0)
        crashed = pool.submit(hostile_work.crash, tmp_path)
        once = pool.submit(hostile_work.crash_once, tmp_path / "mark")
        failed, refused = pool.submit(hostile_work.fail, 0), pool.submit(hostile_work.refuse, 0)
        frames = pool.submit(hostile_work.ramp, (2, 3, 5))
        assert [future.result() for future in doubled] == list(range(0, 40, 2))
        assert np.array_equal(frames.result(), hostile_work.ramp((2, 3, 5)))
        assert once.result() == "recovered"
        with pytest.raises(TaskDiedError, match="its process ended with code -6"):
            crashed.result()
        assert len(list(tmp_path.iterdir())) == 1 + 2  # the mark, and two attempts
        with pytest.raises(TaskDiedError, match="RuntimeError: a decoder's own error"):
            failed.result()
        with pytest.raises(InputError, match="no such decoder"):
            refused.result()
        with pytest.raises(TaskDiedError, match="its process ended with code 1"):
            hanging.result()
        assert pool.submit(hostile_work.double, 4).result() == 8


def test_a_worker_outlives_the_signals_of_a_scheduler_for_a_while(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ".")
    with ProcessPool(num_workers=1, timeout_seconds=60) as pool:
        worker = pool.submit(hostile_work.signal_self, 0).result()
        assert pool.submit(hostile_work.signal_self, 0).result() == worker


def test_a_process_that_media_took_over_can_run_nothing_in_the_trainer_and_give_it_no_memory_that_changes(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", ".")
    with ProcessPool(num_workers=1, timeout_seconds=60) as pool:
        pickled = pool.submit(hostile_work.answer_with_a_pickle, tmp_path / "mark")
        short = pool.submit(hostile_work.answer_with_less_memory_than_it_says, (1 << 20,))
        unsealed = pool.submit(hostile_work.answer_with_memory_that_can_shrink, (4096,))
        for taken_over in (pickled, short, unsealed):
            with pytest.raises(TaskDiedError, match="its process gave no answer"):
                taken_over.result(60)
        assert not (tmp_path / "mark").exists()
        frames = pool.submit(hostile_work.ramp, (2, 3)).result()
        frames += 1  # its own copy
        assert np.array_equal(frames, hostile_work.ramp((2, 3)) + 1)


@pytest.mark.parametrize(
    "told",
    [
        "text",
        [],
        [{"stamp": "s"}],
        [{"stamp": "s", "facts": {"version": "1"}}],
        [{"stamp": "s", "facts": {**FACTS, "num_frames": 1 << 70}}],
        [{"stamp": "s", "facts": {**FACTS, "fps": [1, 0]}}],
        [{"stamp": "s", "facts": {**FACTS, "duration": "long"}}],
        [{"stamp": "s", "facts": FACTS}] * 2,
    ],
    ids=str,
)
def test_what_a_process_cannot_have_found_of_a_file_refuses_the_file(told, tmp_path):
    file = FileToProbe(source="a.mp4", media=Media(url=str(tmp_path / "a.mp4")), ranges=(None,))
    (clip,) = _clips(file, [{"stamp": "s", "facts": FACTS}])
    assert clip.facts is not None
    assert clip.facts.fps == Fraction(30000, 1001)
    assert [clip.reason for clip in _clips(file, told)] == (["decoder_crashed"] if told else [])
