"""Objects behind a URL: their facts, a range of their bytes, or all of them, tried again while what fails may pass.

S3, Google, Azure and HTTP servers are read by obstore with the clients of ``shared.stores.clients`` (so by the same
variables for credentials and endpoints), Hugging Face repositories by its fsspec file system (``HF_TOKEN``,
``HF_ENDPOINT``). Clients are made when first used, one a bucket or host in each process. obstore's threads do not
survive a fork: a child's request would never end, and is refused.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, BinaryIO, Protocol, TypeVar

from shared.errors import InputError
from shared.media.refusal import MediaError
from shared.media.urls import scheme_of, split_bucket

RETRY_SECONDS = 30.0
"""How long a request that fails in a way that may pass is made again."""
_CLIENT_RETRY_SECONDS = 5.0
"""Of these, how long obstore does so by itself."""
_LONGEST_WAIT_SECONDS = 8.0
_CREDENTIALS = ("AWS_", "GOOGLE_", "AZURE_", "HF_")
_RENEWABLE = {"ExpiredToken", "ExpiredTokenException", "RequestTimeTooSkewed", "TokenRefreshRequired"}
"""The next attempt fails as well, but the clip is not to blame."""
_TIDY_PATH = re.compile(r"[A-Za-z0-9_.\-/]*")

Result = TypeVar("Result")
_requesting_process: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a server says of an object."""

    size: int
    tag: str
    """Changes when the object does: its ETag, or the time of its last change."""


class NoRangeError(Exception):
    """The server sends no ranges, or the object ends before this one."""


class Remote(Protocol):
    """One object."""

    url: str

    def facts(self) -> Facts:
        """Returns its size and tag; reads no content."""
        ...

    def read(self, start: int, end: int) -> bytes:
        """Returns the bytes from ``start`` up to ``end``, or fewer where it ends before.

        Raises:
            NoRangeError: if the server sends no ranges, or the object ends before this one.
        """
        ...

    def read_if_smaller(self, limit: int) -> bytes | int:
        """Returns all bytes if there are at most ``limit``, else how many there are."""
        ...

    def fetch(self, file: BinaryIO) -> None:
        """Writes all bytes to a file."""
        ...


def remote(url: str) -> Remote:
    """Returns the object at a URL; nothing is asked of the server.

    Raises:
        MediaError: if there are no credentials.
    """
    if scheme_of(url) == "hf":
        from shared.media.hub import HubObject  # Its library takes a second to import.

        return HubObject(url)
    try:
        return StoredObject(url)
    except InputError as error:
        raise MediaError("not_reachable", str(error), transient=True) from None


class StoredObject:
    """An object of S3, Google, Azure or an HTTP server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client, self._key = client_of(url)

    def facts(self) -> Facts:
        try:
            return _facts(self._get(lambda result: result.meta, range=(0, 1)))
        except NoRangeError:
            return _facts(self._get(lambda result: result.meta))

    def read(self, start: int, end: int) -> bytes:
        return self._get(lambda result: bytes(result.bytes()), range=(start, end))

    def read_if_smaller(self, limit: int) -> bytes | int:
        def take(result: Any) -> bytes | int:
            size: int = result.meta["size"]
            return size if size > limit else bytes(result.bytes())

        return self._get(take)

    def fetch(self, file: BinaryIO) -> None:
        def take(result: Any) -> None:
            file.seek(0)
            file.truncate()
            for chunk in result.stream(min_chunk_size=4 * 1024 * 1024):
                file.write(chunk)

        self._get(take)

    def _get(self, take: Callable[[Any], Result], **options: Any) -> Result:
        import obstore
        from obstore.exceptions import BaseError, NotSupportedError

        from shared.stores.refusals import parse_refusal

        def request() -> Result:
            try:
                return take(obstore.get(self._client, self._key, options=options))  # type: ignore[arg-type]
            except BaseError as error:
                is_range = isinstance(error, NotSupportedError) or parse_refusal(str(error)).status == 416
                if "range" not in options or not is_range:
                    raise
                raise NoRangeError(self.url) from None

        return repeat(self.url, request)


def _facts(meta: Any) -> Facts:
    modified = meta["last_modified"]
    return Facts(size=meta["size"], tag=meta["e_tag"] or str(int(modified.timestamp())))


def list_objects(url: str) -> Iterator[tuple[str, int]]:
    """Yields URL and size of every object below a prefix, in the order of their names.

    Raises:
        MediaError: if the server cannot be asked or does not list.
    """
    if scheme_of(url) == "hf":
        from shared.media.hub import list_hub

        yield from list_hub(url)
        return
    if scheme_of(url) in ("http", "https"):
        raise MediaError("not_readable", f"{url}: web servers list no files: name each, or a manifest of them")
    import obstore

    client, prefix = client_of(url)
    found = repeat(url, lambda: obstore.list(client, prefix=prefix.strip("/") or None, chunk_size=1000).collect())
    bucket, _ = split_bucket(url)
    yield from sorted((f"{bucket}/{item['path']}", item["size"]) for item in found)


def client_of(url: str) -> tuple[Any, str]:
    """Returns obstore's client for a URL, and the key to ask it for.

    Raises:
        InputError: if the URL names no bucket, or there are no credentials.
    """
    place, key = split_bucket(url)
    if scheme_of(url) in ("http", "https") and not _TIDY_PATH.fullmatch(key):
        place, key = url, ""  # Queries and escapes reach the server as they are.
    environment = tuple(sorted(pair for pair in os.environ.items() if pair[0].startswith(_CREDENTIALS)))
    return _client(place, environment), key


@lru_cache(maxsize=64)
def _client(place: str, environment: tuple[tuple[str, str], ...]) -> Any:
    from shared.stores.clients import open_client

    if scheme_of(place) not in ("http", "https"):
        return open_client(place, retry_seconds=_CLIENT_RETRY_SECONDS)
    from obstore.exceptions import BaseError
    from obstore.store import HTTPStore

    try:
        return HTTPStore.from_url(
            place,
            client_options={
                "timeout": timedelta(minutes=10),
                "read_timeout": timedelta(seconds=60),
                "allow_http": scheme_of(place) == "http",
            },
            retry_config={"retry_timeout": timedelta(seconds=_CLIENT_RETRY_SECONDS)},
        )
    except (BaseError, ValueError) as error:
        raise InputError(f"{place} is no URL of a file: {error}") from None


def repeat(url: str, request: Callable[[], Result]) -> Result:
    """Returns what ``request`` gives, made again while what fails may pass.

    Raises:
        MediaError: ``missing``, ``not_readable``, or, when time is up, ``not_reachable``.
    """
    global _requesting_process
    from obstore.exceptions import BaseError

    from shared.stores.refusals import may_pass, parse_refusal

    if _requesting_process not in (None, os.getpid()):
        raise RuntimeError("remote files were read before this process was forked: start it by spawn or forkserver")
    _requesting_process = os.getpid()
    begin, wait_seconds = time.monotonic(), 0.5
    while True:
        try:
            return request()
        except (BaseError, FileNotFoundError) as error:
            refusal = parse_refusal(str(error))
            if isinstance(error, FileNotFoundError) or refusal.status in (404, 410):
                raise MediaError("missing", f"no object {url}") from None
            if refusal.code not in _RENEWABLE and not may_pass(refusal):
                raise MediaError("not_readable", f"{url}: {refusal.summary}") from None
            elapsed = time.monotonic() - begin
            if refusal.code in _RENEWABLE or elapsed + wait_seconds > RETRY_SECONDS:
                detail = f"{url}: no success within {elapsed:.0f} s: {refusal.summary}"
                raise MediaError("not_reachable", detail, transient=True) from None
        time.sleep(random.uniform(wait_seconds / 2, wait_seconds))
        wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
