"""The folder of one run in the cache, ``runs/<time>-<random>/``: its events as they happen, its figures at the end.

Object stores cannot append, so events are buffered and put as parts, ``events-00000.jsonl`` and so on, one a minute,
by a thread: a store that is slow does not hold up the driver. What cannot be written is no reason to stop a job: it is
kept and tried again with the next part.
"""

import json
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime

from preprocess.events import Event, event_json
from shared.cache import layout
from shared.errors import InputError
from shared.stores.store import Store, StoreError

PART_SECONDS = 60.0
MOST_LINES = 100_000
"""That wait for a store which does not answer; the oldest go first."""


class RunFolder:
    """Where a run writes what it did. :meth:`close` it.

    Args:
        store: The cache's.
        clock: Gives seconds since the epoch.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        begun = datetime.fromtimestamp(clock(), UTC)
        self.name = f"{begun:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        """Below ``runs/``; names sort by time."""
        self._store, self._clock = store, clock
        self._lines: deque[bytes] = deque(maxlen=MOST_LINES)
        self._part: list[bytes] = []
        """What is being written, or could not be."""
        self._writing: Future[bool] | None = None
        self._num_parts = 0
        self._next_part = clock() + PART_SECONDS
        self._thread = ThreadPoolExecutor(1)

    @property
    def url(self) -> str:
        """For people."""
        return f"{self._store.url}/{layout.RUN_FOLDER}/{self.name}"

    def log(self, event: Event) -> None:
        """Keeps an event for the next part."""
        value = event_json(event, datetime.fromtimestamp(self._clock(), UTC))
        self._lines.append(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())

    def tick(self) -> None:
        """Begins to write a part if it is time to; call it every few seconds."""
        if self._clock() >= self._next_part and (self._writing is None or self._writing.done()):
            self._begin_part()

    def write(self, name: str, data: bytes) -> bool:
        """Writes a file of the run; returns whether it could, and says on stderr if it could not."""
        try:
            self._store.write(f"{layout.RUN_FOLDER}/{self.name}/{name}", data)
        except StoreError as error:
            print(f"note: {name} of this run could not be written: {error}", file=sys.stderr)
            return False
        return True

    def close(self) -> None:
        """Writes what is not written yet, and waits for it."""
        if self._writing is not None:
            self._writing.result()
        self._begin_part()
        self._thread.shutdown()

    def _begin_part(self) -> None:
        self._next_part = self._clock() + PART_SECONDS
        if self._writing is not None and self._writing.result():
            self._part = []
            self._num_parts += 1
        self._writing = None
        self._part = [*self._part, *self._lines][-MOST_LINES:]
        self._lines.clear()
        if self._part:
            data = b"".join(line + b"\n" for line in self._part)
            self._writing = self._thread.submit(self.write, f"events-{self._num_parts:05}.jsonl", data)


def newest_run(store: Store, file: str) -> str:
    """Returns the name of the newest run that has a file of this name.

    Raises:
        InputError: There is none.
    """
    runs = [entry.path.split("/")[1] for entry in store.list(layout.RUN_FOLDER) if entry.path.endswith(f"/{file}")]
    if not runs:
        raise InputError(f"{store.url}: found no run with a {file}: expected a cache into which a job has encoded")
    return max(runs)


def read_of_run(store: Store, run: str, file: str) -> bytes:
    """Returns a file of a run.

    Raises:
        InputError: There is none.
    """
    try:
        return store.read(f"{layout.RUN_FOLDER}/{run}/{file}")
    except (FileNotFoundError, ValueError):
        raise InputError(
            f"{store.url}: run {run!r} has no {file}: expected a name below {layout.RUN_FOLDER}/"
        ) from None
