"""The members of a tar, from its headers alone: bodies are passed over, nothing is unpacked.

ustar, GNU long names and sizes, pax paths and sizes (POSIX.1-2017, "pax Interchange Format"; GNU tar manual, "Basic Tar
Format"). Every header's checksum is looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 512
_MAX_EXTENSION_BYTES = 1024 * 1024
"""Of a long name or a pax header."""


class TarError(Exception):
    """The tar ends too early, or a header is none; what came before is sound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    """Bytes that are no UTF-8 are lone surrogates in it."""
    offset: int
    """Of its first byte in the tar."""
    size: int
    is_sparse: bool
    """Its bytes do not lie there as they are."""


def tar_members(file: BinaryIO, num_bytes: int) -> Iterator[Member]:
    """Yields the regular files of a tar of so many bytes, in order.

    Raises:
        TarError: where it cannot go on.
    """
    position = 0
    pax: dict[str, bytes] = {}
    long_name: bytes | None = None
    while True:
        header = _read(file, position, BLOCK_BYTES, "ends without the two empty blocks that end a tar")
        if not any(header):
            return
        _check(header, position)
        kind, size = header[156:157], _number(header[124:136], position)
        is_extension = kind in b"xgXLK" and kind != b""
        if not is_extension and "size" in pax:
            size = _decimal(pax["size"], position)
        body = position + BLOCK_BYTES
        position = body + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if is_extension:
            if size > _MAX_EXTENSION_BYTES:
                raise TarError(f"a header of {size} bytes at byte {body - BLOCK_BYTES}")
            content = _read(file, body, size, "is cut in a header")
            if kind in b"xX":
                pax = _pax_records(content, body)
            elif kind == b"L":
                long_name = content.split(b"\0", 1)[0]
            continue
        if body + size > num_bytes:
            raise TarError(f"is cut in {_name(header, pax, long_name)!r}: {num_bytes} bytes")
        if kind in (b"0", b"\0", b"7", b"S"):
            is_sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in pax)
            yield Member(name=_name(header, pax, long_name), offset=body, size=size, is_sparse=is_sparse)
        pax, long_name = {}, None


def _read(file: BinaryIO, offset: int, size: int, trouble: str) -> bytes:
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise TarError(f"{trouble}, at byte {offset + len(content)}")
    return content


def _check(header: bytes, position: int) -> None:
    stated = _number(header[148:156], position)
    if stated != sum(header) - sum(header[148:156]) + 8 * 32:
        raise TarError(f"has no header where one should be, at byte {position}")


def _number(field: bytes, position: int) -> int:
    if field[0] == 0x80:  # GNU: binary, for what is too large for octal digits
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip() or b"0"
    if not all(digit in b"01234567" for digit in text):
        raise TarError(f"has no header where one should be, at byte {position}")
    return int(text, 8)


def _decimal(text: bytes, position: int) -> int:
    if not text.isdigit() or len(text) > 19:
        raise TarError(f"a size of {text[:20]!r} before byte {position}")
    return int(text)


def _pax_records(content: bytes, position: int) -> dict[str, bytes]:
    """Returns a pax header's records, each ``LENGTH KEY=VALUE\\n``."""
    found: dict[str, bytes] = {}
    while content:
        length, space, _ = content[:20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(content):
            raise TarError(f"a pax header that is none at byte {position}")
        key, _, value = content[len(length) + 1 : int(length)].removesuffix(b"\n").partition(b"=")
        found[key.decode("utf-8", "replace")] = value
        content = content[int(length) :]
    return found


def _name(header: bytes, pax: dict[str, bytes], long_name: bytes | None) -> str:
    name = pax.get("path", long_name)
    if name is None:
        name = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix and header[257:263] == b"ustar\0":
            name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape").removeprefix("./")
