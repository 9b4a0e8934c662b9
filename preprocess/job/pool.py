"""The workers of a job: actors that appear with the cluster's GPUs, and leave with them."""

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from preprocess.config import PreprocessConfig
from preprocess.job import cluster
from preprocess.job.decoding import NVDEC_SHARE
from preprocess.job.worker import LEAST_AT_HAND, MOST_AT_HAND, Worker
from preprocess.messages import Loaded, MicroBatch, Role
from shared.cache.dataset import Cache
from shared.errors import InputError
from shared.stores.store import StoreBusyError

_START_SECONDS = 1800.0
"""For the first worker to be placed and to load the encoders, downloads included."""
_GROW_SECONDS = 5.0
_MAX_LOAD_DEATHS = 3
"""Workers in a row that die while they load."""
_MUST_BE_ON_GPU = {"auto": None, "cuda": True, "cpu": False}
_OBJECT_SHARE = 0.4
"""Of a node's memory for objects, for frames that are decoded ahead."""


@dataclass(eq=False, kw_only=True, slots=True)
class Member:
    """One worker."""

    name: str
    actor: Any
    role: Role
    waiting: Any
    """The answer to come, of its loading and then of its looking at the output; None once it is ready."""
    loaded: Loaded | None = None
    running: dict[str, int] = field(default_factory=dict)
    """Shards that it was given, in that order, and the bytes of their frames."""

    @property
    def is_ready(self) -> bool:
        """Whether it can be given work."""
        return self.waiting is None

    @property
    def node(self) -> str:
        """Its node's address, once it has loaded."""
        return self.loaded.node if self.loaded else ""

    def has_room(self, decode_bytes: int) -> bool:
        """Returns whether it can take a shard, if so many bytes of frames are decoded ahead."""
        if len(self.running) < LEAST_AT_HAND:
            return True
        return len(self.running) < MOST_AT_HAND and sum(self.running.values()) < decode_bytes


class Pool:
    """The workers.

    Args:
        config: Resolved.
        micro_batch: Of the cache, if there is one.
        clips_root: What the clips' sources are relative to.
        started: Called with name, node and seconds of each worker that has loaded.
    """

    def __init__(
        self,
        config: PreprocessConfig,
        clips_root: str,
        micro_batch: MicroBatch | None,
        started: Callable[[str, str, float], None],
    ) -> None:
        self.config, self.micro_batch = config, micro_batch
        self._clips_root, self._started = clips_root, started
        self.members: list[Member] = []
        self._load_deaths = self._num_embedded = 0
        self._grown = -_GROW_SECONDS
        self._cache: Cache | None = None
        self._witness = f".tmp-{secrets.token_hex(8)}"
        self._on_gpu = config.device == "cuda" or (config.device == "auto" and cluster.num_gpus() > 0)
        self._role: Role = "vae" if config.text_gpus and not config.only_texts else "both"
        self.decode_bytes = self._find_decode_bytes()
        """Of frames that each worker has decoded ahead, at most."""
        self._start(self._role)  # alone at first: it finds what a new cache is to record
        if self._role == "vae":
            self._start("text")

    def _start(self, role: Role) -> None:
        share = self.config.gpus_per_worker if role != "text" else 1
        if self.config.decoder != "cpu":
            share *= 1 - NVDEC_SHARE
        actor = Worker.options(num_gpus=share if self._on_gpu else 0).remote()
        loading = actor.load.remote(
            self.config,
            self._clips_root,
            role,
            self.micro_batch,
            self.decode_bytes,
            _MUST_BE_ON_GPU[self.config.device],
        )
        taken = {member.name for member in self.members}
        name = next(name for number in count(1) if (name := f"{role}-{number}") not in taken)
        self.members.append(Member(name=name, actor=actor, role=role, waiting=loading))

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
        if not self._on_gpu:
            return 1
        a_gpu = int(1 / self.config.gpus_per_worker + 1e-9)
        return max(a_gpu * int(cluster.num_gpus() - self._num_texts_wanted()), 1)

    def _num_texts_wanted(self) -> int:
        return self.config.text_gpus if self._role == "vae" else 0

    def first_loaded(self, is_over: Callable[[], bool]) -> list[Loaded]:
        """Waits for the first worker of each role and returns what they loaded; nothing if it is over before.

        Raises:
            InputError: if a model cannot be loaded, or no worker could be placed.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not all(member.loaded for member in self.members):
            if is_over():
                return []
            self.take_news(timeout=1.0)
            if time.monotonic() > deadline:
                raise InputError(
                    f"no worker started within {_START_SECONDS:.0f} s: are the GPUs taken by others? See `ray status`"
                )
        return [member.loaded for member in self.members if member.loaded]

    def open(self, cache: Cache) -> None:
        """Lets the workers, those to come too, look whether they see what the driver writes into the cache."""
        self._cache = cache
        cache.store.write(self._witness, b"")
        for member in self.members:
            self._check(member)

    def close(self) -> None:
        """Takes away what the workers looked at."""
        if self._cache is not None:
            self._cache.store.delete(self._witness)

    def _check(self, member: Member) -> None:
        assert self._cache is not None
        assert member.loaded is not None
        self._cache.require(member.loaded.provenance)
        member.waiting = member.actor.check_output.remote(self._cache.url, self._witness)

    def take_news(self, timeout: float = 0.0) -> None:
        """Takes note of workers that have loaded or looked at the output since the last call.

        Raises:
            InputError: if a model cannot be loaded, the output is not what the driver sees, or workers die again and
                again while they load.
        """
        waiting = {member.waiting: member for member in self.members if member.waiting is not None}
        if not waiting:
            return
        ready, _ = ray.wait(list(waiting), num_returns=1 if timeout else len(waiting), timeout=timeout)
        for reference in ready:
            self._take(waiting[reference])

    def _take(self, member: Member) -> None:
        try:
            answer = ray.get(member.waiting)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, StoreBusyError) and member.loaded is not None:
                self._check(member)  # the store tries for a while by itself
                return
            if isinstance(cause, InputError):
                raise cause from None
            self._load_deaths += not isinstance(error, RayActorError) or cluster.is_at_fault(error)
            if self._load_deaths >= _MAX_LOAD_DEATHS:
                raise InputError(
                    f"{self._load_deaths} workers in a row failed while they loaded the encoders "
                    f"({_line(cause or error)}): expected memory and a GPU for them: see the logs of Ray"
                ) from None
            self.remove(member)
            if self._cache is None:  # nothing grows yet
                self._start(member.role)
            return
        self._load_deaths = 0
        if member.loaded is not None:
            member.waiting = None
            self._started(member.name, member.node, member.loaded.seconds)
            return
        member.loaded = answer
        if self._cache is not None:
            self._check(member)
        else:
            member.waiting = None

    def grow(self) -> None:
        """Starts workers for GPUs that came into the cluster, and in place of those that are gone."""
        if time.monotonic() - self._grown < _GROW_SECONDS:
            return
        self._grown = time.monotonic()
        wanted_by_role: dict[Role, int] = {"text": self._num_texts_wanted(), self._role: self._num_wanted()}
        for role, wanted in wanted_by_role.items():
            have = sum(member.role == role for member in self.members)
            for _ in range(wanted - have):
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
        wanted = "text" if texts and self._role == "vae" else self._role
        return [member for member in self.members if member.is_ready and member.role == wanted]

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

    def encode_null_caption(self, cache: Cache) -> None:
        """Stores the embedding of the empty caption."""
        member = next(member for member in self.members if member.role != "vae" and member.loaded is not None)
        ray.get(member.actor.encode_null_caption.remote(cache.url))

    def _texts(self) -> list[Member]:
        return [member for member in self.members if member.role == "text" and member.is_ready]


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
