"""Files of Hugging Face repositories, ``hf://datasets/OWNER/NAME@REVISION/PATH``, by its library's fsspec file system.

The library reads ``HF_TOKEN`` and ``HF_ENDPOINT``.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar, cast

from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError

from shared.media.refusal import MediaError
from shared.media.remote import RETRY_SECONDS, Facts

Result = TypeVar("Result")
LIBRARY_ERRORS = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""OSError, and what the HTTP client raises that the library uses: which one that is depends on its version."""
_PART_BYTES = 64 * 1024 * 1024


class HubObject:
    """A file of a repository, see ``shared.media.remote.Remote``."""

    def __init__(self, url: str) -> None:
        self.url = url

    def facts(self) -> Facts:
        found = _repeat(self.url, lambda: _files().info(self.url))
        if found["type"] != "file":
            raise MediaError("not_a_file", f"{self.url} is a folder")
        lfs = found.get("lfs") or {}
        return Facts(size=found["size"], tag=lfs.get("sha256") or found["blob_id"])

    def read(self, start: int, end: int) -> bytes:
        return _repeat(self.url, lambda: bytes(_files().cat_file(self.url, start=start, end=end)))

    def read_if_smaller(self, limit: int) -> bytes | int:
        size = self.facts().size
        if size > limit:
            return size
        return self.read(0, size) if size else b""

    def fetch(self, file: BinaryIO) -> None:
        size = self.facts().size
        file.seek(0)
        file.truncate()
        for start in range(0, size, _PART_BYTES):
            file.write(self.read(start, min(start + _PART_BYTES, size)))


def list_hub(url: str) -> Iterator[tuple[str, int]]:
    """Yields URL and size of every file below a folder, sorted."""
    found = cast(dict[str, Any], _repeat(url, lambda: _files().find(url, detail=True)))
    yield from sorted((f"hf://{name}", facts["size"]) for name, facts in found.items())


def _files() -> HfFileSystem:
    return HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"))  # fsspec keeps one a process.


def _repeat(url: str, request: Callable[[], Result]) -> Result:
    begin, wait_seconds = time.monotonic(), 1.0
    while True:
        try:
            return request()
        except FileNotFoundError:
            raise MediaError("missing", f"no object {url}") from None
        except (ValueError, NotImplementedError) as error:  # the latter for a path that names no repository
            raise MediaError("bad_path", f"{url}: {error}") from None
        except LIBRARY_ERRORS as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response else None
            summary = " ".join(str(error).split())[:300]
            if status == 404:
                raise MediaError("missing", f"no object {url}") from None
            if status is not None and status < 500 and status not in (408, 429):
                raise MediaError("not_readable", f"{url}: {summary}") from None
            elapsed = time.monotonic() - begin
            if elapsed + wait_seconds > RETRY_SECONDS:
                detail = f"{url}: no success within {elapsed:.0f} s: {summary}"
                raise MediaError("not_reachable", detail, transient=True) from None
        time.sleep(wait_seconds)
        wait_seconds *= 2
