"""What a file's version is: its size and a hash of its two ends, which hold the tables of all containers."""

import hashlib
import os
from typing import BinaryIO

from shared.media.clip import Media
from shared.media.container import refusal
from shared.media.refusal import MediaError

_VERSION_BYTES = 65_536


def version_and_beginning(media: Media, file: BinaryIO) -> tuple[str, bytes]:
    """Returns the version of an open file, and its first bytes.

    Raises:
        MediaError: if it cannot be read, or is empty.
    """
    try:
        beginning = file.read(_VERSION_BYTES)
        digest = hashlib.sha256(beginning)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _VERSION_BYTES, 0))
        digest.update(file.read(_VERSION_BYTES))
    except OSError as error:
        raise refusal(media, error, "not_readable") from None
    if size == 0:
        raise MediaError("empty", f"{media} has 0 bytes")
    return f"{size}-{digest.hexdigest()[:16]}", beginning
