"""The Ray cluster: joining it, what it has, and what its errors mean."""

import contextlib
import os
import re
import socket
from collections.abc import Collection, Iterator
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from shared.errors import InputError
from shared.wording import counted

LOSSES = (OutOfMemoryError, NodeDiedError, ObjectLostError, LocalRayletDiedError)
"""Of a worker, for reasons that need not lie in its clip."""
TASK_FAILURES = (WorkerCrashedError, RayTaskError, *LOSSES)

_ADDRESS = re.compile(r"^\s*ip: (\S+)$", re.MULTILINE)
_NODE_WORDS = ("node has died", "node died", "node was terminated", "node is dead", "node failure", "node has been")


@contextlib.contextmanager
def joined_cluster(address: str | None) -> Iterator[None]:
    """Joins the Ray cluster at HOST:PORT, or that of the variable RAY_ADDRESS, or one on this machine, or starts one.

    Raises:
        InputError: if none answers, or a task raised one.
    """
    _check_answers(address or os.environ.get("RAY_ADDRESS", ""))
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of tasks whose end is known before it is reported
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers ({error}): start one, or leave out --address and RAY_ADDRESS"
        ) from None
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises :class:`InputError` if nobody listens at HOST:PORT; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): start one, or leave out --address and RAY_ADDRESS"
        ) from None


def num_gpus(avoided: Collection[str] = ()) -> float:
    """Returns the GPUs of the nodes that are in the cluster now, but for some."""
    return float(sum(node["Resources"].get("GPU", 0) for node in _alive() if node["NodeID"] not in avoided))


def nodes_for_workers(*, on_gpu: bool) -> set[str]:
    """Returns the nodes that can have workers."""
    return {node["NodeID"] for node in _alive() if not on_gpu or node["Resources"].get("GPU")}


def not_on(nodes: Collection[str]) -> dict[str, str] | None:
    """Returns the label selector of tasks and actors that some nodes must not get; None if all may."""
    return {"ray.io/node-id": f"!in({','.join(sorted(nodes))})"} if nodes else None


def what_there_is() -> str:
    """Returns what the cluster has and what of it is free, for a line that says what it lacks."""
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [
        f"{counted(round(float(total.get(name, 0)), 2), name)}, {round(float(free.get(name, 0)), 2):g} free"
        for name in ("GPU", "CPU")
    ]
    return f"the cluster has {' and '.join(parts)}, on {counted(len(_alive()), 'node')}"


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def has_cpus() -> bool:
    """Returns whether some node of the cluster has a CPU for a task, free or not."""
    return any(node["Resources"].get("CPU", 0) >= 1 for node in _alive())


def num_cpus() -> int:
    """Returns the CPUs of the nodes that are in the cluster now, at least 1."""
    return max(int(ray.cluster_resources().get("CPU", 1)), 1)


def object_store_bytes() -> float:
    """Returns the memory for objects of the node with GPUs (or, if there are none, of the node) that has least."""
    resources = [node["Resources"] for node in _alive()]
    with_gpus = [found for found in resources if found.get("GPU")]
    stores = [found.get("object_store_memory", 0.0) for found in with_gpus or resources]
    return min((store for store in stores if store), default=0.0)


def node_of_death(error: BaseException) -> str | None:
    """Returns the node on which an actor died, as far as its error says so: by an address that one node alone has."""
    found = _ADDRESS.search(str(error))
    nodes = [node["NodeID"] for node in _alive() if found and node["NodeManagerAddress"] == found[1]]
    return nodes[0] if len(nodes) == 1 else None


def is_at_fault(error: RayActorError) -> bool:
    """Returns whether an actor's death may lie in what it did; not so if its node died or was preempted."""
    if getattr(error, "preempted", False):
        return False
    text = str(error).lower()
    return not any(words in text for words in _NODE_WORDS)
