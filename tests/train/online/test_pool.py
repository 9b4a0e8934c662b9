"""Processes for work that may crash or hang."""

import numpy as np
import pytest

from shared.errors import InputError
from tests.train.online import hostile_work
from train.online.pool import ProcessPool, TaskDiedError


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
