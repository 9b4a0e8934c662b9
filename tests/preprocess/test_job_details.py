"""What the driver settles by itself, without a cluster."""

import io
import os
import pickle
import threading

import pytest
import torch

from preprocess.encode import Embeddings
from preprocess.job import cluster
from preprocess.job.decoding import _decode_samples
from preprocess.job.patience import patiently
from preprocess.job.probing import check_moves
from shared.clips.deadline import within
from shared.errors import InputError
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


@pytest.mark.parametrize(("has_cpus", "most_seconds"), [(True, 10 + 16 * 300), (False, 10)])
def test_probing_that_stands_still_for_longer_than_its_tasks_may_take_ends_with_what_there_is(
    monkeypatch: pytest.MonkeyPatch, has_cpus: bool, most_seconds: float
) -> None:
    monkeypatch.setattr(cluster, "has_cpus", lambda: has_cpus)
    monkeypatch.setattr(cluster, "what_there_is", lambda: "the cluster has nothing")
    check_moves(most_seconds, 10, 300)
    with pytest.raises(InputError, match="a probing task asks for a CPU, and the cluster has nothing: free some"):
        check_moves(most_seconds + 1, 10, 300)


def test_the_node_of_a_death_is_known_by_an_address_that_one_node_alone_has(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": name, "NodeManagerAddress": address, "Alive": True} for name, address in ("a1", "b2", "c2")]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    text = "The actor died.\n\tclass_name: _Worker\n\tactor_id: 7\n\tip: {}\nThe actor never ran"
    found = [cluster.node_of_death(RuntimeError(text.format(address))) for address in ("1", "2", "3")]
    assert found == ["a", None, None]
    assert cluster.node_of_death(RuntimeError("no address")) is None
