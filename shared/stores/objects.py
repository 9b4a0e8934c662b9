"""A store on an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure.

Endpoint and credentials are the usual ones: for S3 ``AWS_ENDPOINT_URL``, ``AWS_REGION`` and ``AWS_ACCESS_KEY_ID`` with
``AWS_SECRET_ACCESS_KEY``, or what boto3 finds (``AWS_PROFILE``, ``~/.aws``, single sign-on, the instance's role); for
Google ``GOOGLE_APPLICATION_CREDENTIALS``; for Azure ``AZURE_STORAGE_ACCOUNT_NAME`` and ``AZURE_STORAGE_ACCOUNT_KEY``.

A request that fails in a way that may pass (throttling, a lost connection, an error of the server) is made again, after
waits that double and vary; the client does so by itself for a few seconds, and :class:x around it for as long
as the store is told to.
"""

import builtins
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import BinaryIO, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from shared.stores import files
from shared.stores.clients import open_client
from shared.stores.ranges import merge_ranges
from shared.stores.refusals import explain, may_pass, parse_refusal
from shared.stores.store import Entry, checked_path

RETRY_SECONDS = 120.0
"""How long a request that fails in a way that may pass is made again."""
PART_BYTES = 16 * 1024 * 1024
"""Of a multipart upload; what is smaller goes in one request."""
NUM_PARTS_AT_ONCE = 4
"""Parts in flight; so an upload holds 64 MiB."""
MERGE_BYTES = 256 * 1024
"""Ranges no farther apart than this are read by one request: it takes less time than another request's latency."""
LONGEST_WAIT_SECONDS = 10.0

Result = TypeVar("Result")

_client_process: int | None = None
"""The process that made requests. The client's threads do not survive a fork: a child's request would never end."""


class _BehindTheEndError(Exception):
    """A range starts where the object has no more bytes."""


class ObjectStore:
    """A prefix in a bucket, see ``shared.stores.store.Store``. The bucket must exist.

    Not to be used on both sides of a fork: start worker processes by spawn or forkserver.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``; the prefix may be left out.
        retry_seconds: How long what may pass is tried again.

    Raises:
        InputError: The URL names no bucket, or no credentials are found.
    """

    def __init__(self, url: str, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self._url, self._retry_seconds = url.rstrip("/"), retry_seconds
        self._client = open_client(self._url, retry_seconds=retry_seconds)
        self._has_answered = False

    def __reduce__(self) -> tuple[Callable[[str, float], "ObjectStore"], tuple[str, float]]:
        return _reopen, (self._url, self._retry_seconds)

    def __repr__(self) -> str:
        return f"ObjectStore({self._url!r})"

    def __str__(self) -> str:
        return self._url

    @property
    def url(self) -> str:
        return self._url

    def read(self, path: str) -> bytes:
        key = checked_path(path)
        return self._read(path, lambda: bytes(obstore.get(self._client, key).bytes()))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        return self.read_ranges(path, [(offset, length)])[0]

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> builtins.list[bytes]:
        key = checked_path(path)
        merged = merge_ranges(ranges, MERGE_BYTES)
        if merged.spans:
            starts, ends = [start for start, _ in merged.spans], [end for _, end in merged.spans]
            try:
                spans = self._read(
                    path, lambda: obstore.get_ranges(self._client, key, starts=starts, ends=ends, coalesce=0)
                )
            except _BehindTheEndError:
                num_bytes = self.size(path)
                if num_bytes is None:
                    raise self._missing(path) from None
                inside = [(offset, max(0, min(length, num_bytes - offset))) for offset, length in ranges]
                return self.read_ranges(path, inside)
        else:
            spans = []
        return [
            bytes(memoryview(spans[place.span])[place.offset : place.offset + length]) if place is not None else b""
            for place, (_, length) in zip(merged.places, ranges, strict=True)
        ]

    def size(self, path: str) -> int | None:
        key = checked_path(path)
        try:
            return self._read(path, lambda: obstore.head(self._client, key)["size"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        start = checked_path(prefix) if prefix else None
        found = self._repeat(
            f"listing {prefix or 'everything'}",
            lambda: obstore.list(self._client, prefix=start, chunk_size=1000).collect(),
        )
        entries = [Entry(path=item["path"], num_bytes=item["size"], modified=item["last_modified"]) for item in found]
        return iter(sorted(entries, key=lambda entry: entry.path))

    def leftovers(self) -> Iterator[Entry]:
        return iter(())

    def write(self, path: str, data: bytes) -> None:
        key = checked_path(path)
        self._repeat(
            f"writing {path} ({len(data):,} bytes)",
            lambda: obstore.put(self._client, key, data, chunk_size=PART_BYTES, max_concurrency=NUM_PARTS_AT_ONCE),
        )

    def write_if_absent(self, path: str, data: bytes) -> bool:
        key = checked_path(path)
        try:
            self._repeat(
                f"writing {path} ({len(data):,} bytes)",
                lambda: obstore.put(self._client, key, data, mode="create", use_multipart=False),
            )
        except AlreadyExistsError:
            try:
                return self.read(path) == data
            except FileNotFoundError:  # Another writer's, and deleted meanwhile.
                return False
        return True

    @contextmanager
    def new_file(self) -> Iterator["ObjectNewFile"]:
        temporary = files.temporary_path(Path(gettempdir()))
        with files.create_file(temporary) as file:
            temporary.unlink()  # Its bytes go when it is closed, even if the process is killed.
            yield ObjectNewFile(self, file)

    def upload(self, path: str, file: BinaryIO) -> None:
        """Writes a whole local file under ``path``, in parts if it is large; nothing is seen before the last one."""
        key = checked_path(path)
        num_bytes = file.seek(0, os.SEEK_END)

        def put() -> None:
            file.seek(0)
            obstore.put(self._client, key, file, chunk_size=PART_BYTES, max_concurrency=NUM_PARTS_AT_ONCE)

        self._repeat(f"writing {path} ({num_bytes:,} bytes)", put)

    def delete(self, path: str) -> None:
        key = checked_path(path)
        with contextlib.suppress(FileNotFoundError):
            self._repeat(f"deleting {path}", lambda: obstore.delete(self._client, key))

    def local_path(self, path: str) -> None:
        checked_path(path)

    def _read(self, path: str, request: Callable[[], Result]) -> Result:
        try:
            return self._repeat(f"reading {path}", request)
        except FileNotFoundError:
            raise self._missing(path) from None

    def _repeat(self, doing: str, request: Callable[[], Result]) -> Result:
        """Returns what ``request`` gives, made again while what fails may pass."""
        global _client_process
        if _client_process not in (None, os.getpid()):
            raise RuntimeError(
                "an object store was used before this process was forked: start it by spawn or forkserver"
            )
        _client_process = os.getpid()
        begin, wait_seconds = time.monotonic(), 1.0
        while True:
            try:
                result = request()
            except AlreadyExistsError:
                self._has_answered = True
                raise
            except (BaseError, FileNotFoundError) as error:
                refusal = parse_refusal(str(error))
                if refusal.status == 416:
                    raise _BehindTheEndError from error
                if isinstance(error, FileNotFoundError) and refusal.code in (None, "NoSuchKey", "BlobNotFound"):
                    raise
                self._has_answered |= refusal.status is not None
                elapsed = time.monotonic() - begin
                if not may_pass(refusal) or not self._has_answered or elapsed + wait_seconds > self._retry_seconds:
                    raise explain(refusal, url=self._url, doing=doing, after_seconds=elapsed) from error
                time.sleep(random.uniform(wait_seconds / 2, wait_seconds))
                wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)
            else:
                self._has_answered = True
                return result

    def _missing(self, path: str) -> FileNotFoundError:
        return FileNotFoundError(f"{self._url}: no object {path}")


class ObjectNewFile:
    """A local file without a name, see ``shared.stores.store.NewFile``."""

    def __init__(self, store: ObjectStore, file: BinaryIO) -> None:
        self._store, self._file = store, file

    @property
    def file(self) -> BinaryIO:
        return self._file

    def publish(self, path: str) -> None:
        self._file.flush()
        self._store.upload(path, self._file)


def _reopen(url: str, retry_seconds: float) -> ObjectStore:
    return ObjectStore(url, retry_seconds=retry_seconds)
