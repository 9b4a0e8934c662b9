"""What the driver settles by itself, without a cluster."""

import io
import pickle

import pytest
import torch

from preprocess.encode import Embeddings
from preprocess.job.patience import patiently
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
