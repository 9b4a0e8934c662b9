"""What the driver settles by itself, without a cluster."""

import io
import os
import pickle
import threading

import pytest
import torch

from preprocess.encode import Embeddings
from preprocess.job.decoding import _decode_samples
from preprocess.job.patience import patiently
from shared.clips.deadline import within
from shared.spec import Bucket
from shared.stores.store import StoreBusyError


def test_embeddings_are_sent_once_and_not_once_a_caption() -> None:
    together = torch.zeros(512 * 40, 64)
    sent = Embeddings(captions=("a",) * 512, lengths=(40,) * 512, together=together)
    buffer = io.BytesIO()
    pickle.dump(sent, buffer)
    assert buffer.tell() < 1.1 * together.nbytes


def test_a_busy_store_is_asked_again_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("preprocess.job.patience.time.sleep", pauses.append)
    answers = iter([StoreBusyError("slow down"), StoreBusyError("slow down"), 7])

    def call() -> int:
        answer = next(answers)
        if isinstance(answer, StoreBusyError):
            raise answer
        return answer

    assert patiently(call) == 7
    assert len(pauses) == 2

    def never() -> int:
        raise StoreBusyError("slow down")

    with pytest.raises(StoreBusyError):
        patiently(never)


def test_decoding_leaves_the_cores_to_whoever_feeds_a_gpu() -> None:
    """Threads have a niceness of their own: this one decodes nothing, and cannot go back afterwards."""
    found: list[int] = []

    def decode() -> None:
        assert not list(_decode_samples([], Bucket(1, 64, 64), device="cpu", timeout_seconds=1))
        found.append(within(10, lambda: os.getpriority(os.PRIO_PROCESS, 0)))

    thread = threading.Thread(target=decode)
    thread.start()
    thread.join(60)
    assert found == [max(10, os.getpriority(os.PRIO_PROCESS, 0))]
