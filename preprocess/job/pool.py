"""The workers of a job: actors that appear with the cluster's GPUs, and leave with them."""

import secrets
import time
from collections.abc import Callable, Collection, Iterable
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from preprocess.config import PreprocessConfig
from preprocess.job import cluster
from preprocess.job.decoding import NVDEC_SHARE
from preprocess.job.member import Member
from preprocess.job.worker import Worker
from preprocess.liveness import Limits, Stuck
from preprocess.messages import Loaded, MicroBatch, Placed, Role
from preprocess.node_health import MOST_DEATHS, NodeHealth
from preprocess.watch import Watch
from shared.cache.dataset import Cache
from shared.errors import InputError
from shared.stores.store import StoreBusyError
from shared.wording import counted

_GROW_SECONDS = 5.0
_MAX_BAD_NODES = 3
"""On which workers die while they load, if none has loaded anywhere: then it is not the nodes."""
_MAX_LOAD_DEATHS = 9
"""In a row while there is no worker, wherever they were."""
_MUST_BE_ON_GPU = {"auto": None, "cuda": True, "cpu": False}
_OBJECT_SHARE = 0.4
"""Of a node's memory for objects, for frames that are decoded ahead."""
_DECODES_A_CLIP = 2
"""With its neighbours, and after a crash by itself."""


class Pool:
    """The workers.

    Args:
        config: Resolved.
        clips_root: What the clips' sources are relative to.
        micro_batch: Of the cache, if there is one.
        watch: Told of workers and nodes.
    """

    def __init__(self, config: PreprocessConfig, clips_root: str, micro_batch: MicroBatch | None, watch: Watch) -> None:
        self.config, self.micro_batch = config, micro_batch
        self._clips_root, self._watch = clips_root, watch
        self.members: list[Member] = []
        self.nodes = NodeHealth()
        self.limits = Limits(
            worker_seconds=config.worker_timeout,
            frame_seconds=config.resource_timeout + _DECODES_A_CLIP * config.decode_timeout,
        )
        self._load_deaths = self._num_embedded = 0
        self._has_loaded = False
        """Some worker, at some time."""
        self._grown = -_GROW_SECONDS
        self._cache: Cache | None = None
        self._witness = f".tmp-{secrets.token_hex(8)}"
        self.on_gpu = config.device == "cuda" or (config.device == "auto" and cluster.num_gpus() > 0)
        """Whether GPUs are set aside for the workers."""
        self._role: Role = "vae" if config.text_gpus and not config.only_texts else "both"
        self._has_placed = dict.fromkeys(self._roles(), time.monotonic())
        """When there last was a worker of each role that had a place."""
        self.decode_bytes = self._find_decode_bytes()
        """Of frames that each worker has decoded ahead, at most."""
        for role in self._roles():  # alone at first: it finds what a new cache is to record
            self._start(role)

    def announcement(self) -> str:
        """Returns how many workers there will be and on what, while they load, for people."""
        num_workers = self._num_wanted() + self._num_texts_wanted()
        kind, verb = "GPU" if self.on_gpu else "CPU", "loads" if num_workers == 1 else "load"
        return f"{counted(num_workers, f'{kind} worker')} {verb} the encoders; {cluster.what_there_is()}"

    def _roles(self) -> tuple[Role, ...]:
        return ("vae", "text") if self._role == "vae" else ("both",)

    def _share(self, role: Role) -> float:
        """Returns the GPUs that are set aside for a worker."""
        share = self.config.gpus_per_worker if role != "text" else 1.0
        if self.config.decoder != "cpu":
            share *= 1 - NVDEC_SHARE
        return share if self.on_gpu else 0.0

    def _start(self, role: Role) -> None:
        avoided = self.nodes.avoided(time.monotonic())
        actor = Worker.options(num_gpus=self._share(role), label_selector=cluster.not_on(avoided)).remote()
        taken = {member.name for member in self.members}
        name = next(name for number in count(1) if (name := f"{role}-{number}") not in taken)
        self.members.append(Member(name=name, actor=actor, role=role, avoided=avoided, waiting=actor.place.remote()))

    def _load(self, member: Member) -> None:
        member.stage = "loading"
        member.waiting = member.actor.load.remote(
            self.config,
            self._clips_root,
            member.role,
            self.micro_batch,
            self.decode_bytes,
            _MUST_BE_ON_GPU[self.config.device],
            frozenset(self.nodes.excluded),
        )

    def _find_decode_bytes(self) -> int:
        """Returns the frames that a worker may have decoded ahead: as asked, and within what its node holds."""
        nodes = max(sum(node["Alive"] for node in ray.nodes()), 1)
        a_node = max(1.0, self._num_wanted() / nodes)
        held = _OBJECT_SHARE * cluster.object_store_bytes() / a_node
        return int(min(self.config.decode_ahead_mb * 1e6, held))

    def _num_wanted(self) -> int:
        """Returns how many workers should encode latents (or, alone, texts)."""
        if self.config.workers is not None:
            return self.config.workers
        if not self.on_gpu:
            return 1
        a_gpu = int(1 / self.config.gpus_per_worker + 1e-9)
        num_gpus = cluster.num_gpus(self.nodes.avoided(time.monotonic()))
        return max(a_gpu * int(num_gpus - self._num_texts_wanted()), 1)

    def _num_texts_wanted(self) -> int:
        return self.config.text_gpus if self._role == "vae" else 0

    def first_loaded(self, is_over: Callable[[], bool]) -> list[Loaded]:
        """Waits for the first worker of each role and returns what they loaded; nothing if it is over before.

        Raises:
            InputError: if a model cannot be loaded, or no worker could be placed.
        """
        while not all(member.loaded for member in self.members):
            if is_over():
                return []
            self.take_news(timeout=1.0)
        return [member.loaded for member in self.members if member.loaded]

    def open(self, cache: Cache, is_over: Callable[[], bool]) -> None:
        """Lets the workers, those to come too, look whether they see what the driver writes into the cache.

        Returns when one of each role does: then the embedding of the empty caption is stored; or if it is over before.
        """
        self._cache = cache
        cache.store.write(self._witness, b"")
        for member in self.members:
            self._check(member)
        while not is_over() and not all(self._of_role(role) for role in self._roles()):
            self.take_news(timeout=1.0)
            self.grow()

    def close(self) -> None:
        """Takes away what the workers looked at."""
        if self._cache is not None:
            self._cache.store.delete(self._witness)

    def _check(self, member: Member) -> None:
        assert self._cache is not None
        assert member.loaded is not None
        self._cache.require(member.loaded.provenance)
        member.stage = "checking"
        member.waiting = member.actor.check_output.remote(self._cache.url, self._witness)

    def take_news(self, timeout: float = 0.0) -> list[tuple[Member, Stuck]]:
        """Takes note of workers that were placed, have loaded or looked at the output since the last call.

        Returns:
            Workers with work that do not get on. Those without are ended here.

        Raises:
            InputError: if a model cannot be loaded, the output is not what the driver sees, workers die again and
                again while they load, or none could be placed for ``--resource-timeout``.
        """
        waiting = {member.waiting: member for member in self.members if member.waiting is not None}
        if waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1 if timeout else len(waiting), timeout=timeout)
            for reference in ready:
                self._take(waiting[reference])
        now = time.monotonic()
        stuck = []
        for member in list(self.members):
            if (found := member.feel_pulse(self.limits, now)) is None:
                continue
            if member.is_ready:
                stuck.append((member, found))
            else:
                self._died_loading(member, found.detail)
        self._check_places(now)
        return stuck

    def _check_places(self, now: float) -> None:
        """Raises :class:`InputError` if there was no worker of a role for too long, and none could be placed."""
        for role in self._roles():
            if any(member.role == role and member.stage != "placing" for member in self.members):
                self._has_placed[role] = now
            elif now - self._has_placed[role] > self.config.resource_timeout:
                kept = f", {len(self.nodes.excluded)} of them kept from work" if self.nodes.excluded else ""
                raise InputError(
                    f"no worker could be placed for {self.config.resource_timeout:g} s: it asks for "
                    f"{counted(float(self._share(role)), 'GPU')}, and {cluster.what_there_is()}{kept}: free some, add "
                    "nodes, or wait longer by --resource-timeout"
                )

    def _take(self, member: Member) -> None:
        """Brings a worker to its next stage."""
        try:
            answer = ray.get(member.waiting)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, StoreBusyError) and member.stage == "checking":
                self._check(member)  # the store tries for a while by itself
            elif isinstance(cause, InputError):
                if member.stage == "checking" and self._others_are_ready(member):
                    self.exclude(member.node_id, str(cause))  # others see the output
                    return
                raise cause from None
            elif isinstance(error, RayActorError) and not cluster.is_at_fault(error):
                self._replace(member)
            else:
                if member.placed is None and (node_id := cluster.node_of_death(error)):
                    member.is_placed(Placed(node_id=node_id, node=""), self.limits)
                self._died_loading(member, _line(cause or error))
            return
        if member.stage == "placing":
            member.is_placed(answer, self.limits)
            self._load(member)
        elif member.stage == "loading":
            member.loaded, member.waiting = answer, None
            self._load_deaths, self._has_loaded = 0, True
            if self._cache is not None:
                self._check(member)
        else:
            assert member.loaded is not None
            member.stage, member.waiting, member.ready_at = "ready", None, time.monotonic()
            self._watch.started(member.name, member.node, member.loaded.seconds)

    def _others_are_ready(self, member: Member) -> bool:
        return any(other.is_ready and other.node_id != member.node_id for other in self.members)

    def _died_loading(self, member: Member, cause: str) -> None:
        """Ends a worker that did not come so far as to have work; its node may be to blame.

        Raises:
            InputError: if there is no other node, or it is not the nodes.
        """
        self._watch.lost(member.name, member.node, cause)
        self._load_deaths += 1
        self.note_death(member, cause, shards=None)
        is_everywhere = not self._has_loaded and len(self.nodes.excluded) >= _MAX_BAD_NODES
        is_alone = self._load_deaths >= MOST_DEATHS and not self._other_nodes(member.node_id)
        gets_nowhere = self._load_deaths >= _MAX_LOAD_DEATHS and not any(other.is_ready for other in self.members)
        if is_everywhere or is_alone or gets_nowhere:
            raise InputError(
                f"{self._load_deaths} workers in a row failed while they loaded the encoders ({cause}): expected "
                "memory and a GPU for them: see the logs of Ray"
            )
        self._replace(member)

    def _replace(self, member: Member) -> None:
        if member not in self.members:
            return
        self.remove(member)
        if self._cache is None:  # nothing grows yet
            self._start(member.role)

    def note_death(self, member: Member, cause: str, *, shards: Collection[str] | None) -> bool:
        """Takes note of a worker's death for its node; returns whether the node is kept from work by this.

        Args:
            member: The worker.
            cause: One line.
            shards: See ``NodeHealth.died``.
        """
        if member.placed is None:  # nobody knows where
            return False
        others = bool(self._other_nodes(member.node_id))
        is_bad = self.nodes.died(member.node_id, cause, shards=shards, others=others, now=time.monotonic())
        if is_bad:
            self._tell_excluded(member.node_id)
        return is_bad

    def exclude(self, node_id: str, cause: str) -> None:
        """Keeps a node from work."""
        if self.nodes.exclude(node_id, cause):
            self._tell_excluded(node_id)

    def has_other_nodes(self, member: Member) -> bool:
        """Returns whether there are nodes, but for a worker's own, that can do its work."""
        return bool(self._other_nodes(member.node_id))

    def _other_nodes(self, node_id: str) -> set[str]:
        return cluster.nodes_for_workers(on_gpu=self.on_gpu) - {node_id} - self.nodes.excluded.keys()

    def _tell_excluded(self, node_id: str) -> None:
        """Tells the log, and the workers, which give the node no more decoding tasks; those on it go when they can."""
        name = next((member.node for member in self.members if member.node_id == node_id), "")
        self._watch.exclude(f"{name} ({node_id[:8]})".strip(), self.nodes.excluded[node_id])
        for member in list(self.members):
            if member.node_id == node_id and not member.running:
                self._replace(member)
            elif member.loaded is not None:
                member.actor.avoid.remote(frozenset(self.nodes.excluded))

    def grow(self) -> None:
        """Starts workers for GPUs that came into the cluster, and in place of those that are gone."""
        now = time.monotonic()
        if now - self._grown < _GROW_SECONDS:
            return
        self._grown = now
        avoided = self.nodes.avoided(now)
        for member in [member for member in self.members if member.stage == "placing" and member.avoided != avoided]:
            self.remove(member)  # asked for with other nodes in mind
        for role in self._roles():
            wanted = self._num_texts_wanted() if role == "text" else self._num_wanted()
            for _ in range(wanted - sum(member.role == role for member in self.members)):
                self._start(role)

    def remove(self, member: Member) -> None:
        """Ends a worker; its GPU is wanted, even if the worker may only have been out of reach."""
        if member in self.members:
            self.members.remove(member)
        ray.kill(member.actor)
        self._grown = -_GROW_SECONDS

    def takers(self, *, texts: bool) -> list[Member]:
        """Returns the workers that can take shards: of texts alone, or of samples."""
        if self._role == "vae" and not self._texts():
            return []  # captions have no worker now
        excluded = self.nodes.excluded
        return [
            member
            for member in self._of_role("text" if texts and self._role == "vae" else self._role)
            if member.node_id not in excluded
        ]

    def embed(self, captions: Iterable[str]) -> tuple[Member, Any, Any]:
        """Has captions embedded by the workers for texts in turn.

        Returns:
            The worker, and the answers to come: figures, which fail if embedding does, and the embeddings.
        """
        texts = self._texts()
        self._num_embedded += 1
        member = texts[self._num_embedded % len(texts)]
        figures, embeddings = member.actor.embed.options(num_returns=2).remote(sorted(captions))
        return member, figures, embeddings

    def waiting(self) -> list[Any]:
        """Returns the answers to come of workers that are not ready."""
        return [member.waiting for member in self.members if member.waiting is not None]

    def _texts(self) -> list[Member]:
        return self._of_role("text")

    def _of_role(self, role: Role) -> list[Member]:
        return [member for member in self.members if member.is_ready and member.role == role]


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
