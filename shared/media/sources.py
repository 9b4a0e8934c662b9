"""The bytes of a clip as a seekable file, wherever it lies: a local file, a member of a tar, an object behind a URL."""

import errno
import io
import os
import stat
import tempfile
from typing import BinaryIO, cast

from shared.media.clip import Media
from shared.media.ranged_file import FileWindow, RangedFile
from shared.media.refusal import MediaError
from shared.media.remote import NoRangeError, remote
from shared.media.urls import scheme_of

WHOLE_BYTES = 64 * 1024 * 1024
"""Objects up to this size are fetched whole, larger ones are read by ranges."""
_PASSING_ERRORS = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.ENETDOWN, errno.ENOTCONN, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip
"""Of a network file system, or of this process: not the clip's fault."""


def open_source(media: Media) -> BinaryIO:
    """Returns the bytes of a clip as a file that can be read and sought; close it.

    Reading from it may raise MediaError too, of what lies behind a URL, and OSError, see :func:`media_error`.

    Raises:
        MediaError: ``missing``, ``not_a_file``, ``not_readable``, ``truncated``, or, transient, ``not_reachable``.
    """
    if scheme_of(media.url) is None:
        return _open_local(media)
    found = remote(media.url)
    if media.offset is None:
        content = found.read_if_smaller(WHOLE_BYTES)
        if isinstance(content, bytes):
            return io.BytesIO(content)
        offset, size = 0, content
    else:
        assert media.size is not None
        offset, size = media.offset, media.size
    try:
        if size <= WHOLE_BYTES:
            content = found.read(offset, offset + size) if size else b""
            if len(content) < size:
                raise MediaError("truncated", f"{media}: the tar ends before it does")
            return io.BytesIO(content)
        found.read(offset, offset + 1)
    except NoRangeError:
        file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
        found.fetch(file)
        file.seek(0)
        return file if media.offset is None else _window(file, media)
    return io.BufferedReader(RangedFile(found.read, offset=offset, size=size), buffer_size=256 * 1024)


def stamp(media: Media) -> str:
    """Returns what changes when the file does: its size, with its time of change or ETag. Reads no content.

    Raises:
        MediaError: as :func:`open_source`.
    """
    if scheme_of(media.url) is None:
        try:
            facts = os.stat(media.url)
        except (OSError, ValueError) as error:
            raise media_error(media.url, error) from None
        _check_regular(media.url, facts)
        found = f"{facts.st_size}-{facts.st_mtime_ns}"
    else:
        object_facts = remote(media.url).facts()
        found = f"{object_facts.size}-{object_facts.tag}"
    return found if media.offset is None else f"{found}@{media.offset}+{media.size}"


def media_error(url: str, error: OSError | ValueError) -> MediaError:
    """Returns the refusal for an error of the file system."""
    if isinstance(error, ValueError):  # of Python: a name with a NUL or a lone surrogate
        return MediaError("bad_path", f"{url!r}: {error}")
    if isinstance(error, FileNotFoundError):
        return MediaError("missing", f"no file {url}")
    if error.errno in _PASSING_ERRORS:
        return MediaError("not_reachable", f"{url}: {error.strerror}", transient=True)
    return MediaError("not_readable", f"{url}: {error.strerror or error}")


def _open_local(media: Media) -> BinaryIO:
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        descriptor = os.open(media.url, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            _check_regular(media.url, os.fstat(descriptor))
        except MediaError:
            os.close(descriptor)
            raise
        file = os.fdopen(descriptor, "rb")
    except (OSError, ValueError) as error:
        raise media_error(media.url, error) from None
    return file if media.offset is None else _window(file, media)


def _check_regular(url: str, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise MediaError("not_a_file", f"{url} is not a regular file")


def _window(file: BinaryIO, media: Media) -> BinaryIO:
    """Returns a member of a tar; closing it closes the tar."""
    assert media.offset is not None
    assert media.size is not None
    if file.seek(0, os.SEEK_END) < media.offset + media.size:
        file.close()
        raise MediaError("truncated", f"{media}: the tar ends before it does")
    return io.BufferedReader(FileWindow(file, offset=media.offset, size=media.size), buffer_size=64 * 1024)
