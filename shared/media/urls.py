"""Where clips and manifests may lie: local paths and URLs of the protocols listed here, joined and taken apart. Pure.

Whatever has another protocol is refused by its name; nothing here is ever handed to a shell or to FFmpeg's own
protocols. A name with a colon and no ``://``, such as ``pipe:1``, is a local file of that name.
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from shared.errors import InputError

OBJECT_SCHEMES = ("s3", "gs", "az", "hf", "http", "https")
"""Protocols that are read over the network."""
EXPECTED = "a local path, s3://, gs://, az://, hf://, http:// or https://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
UNTIDY = r"//|(^|/)\.{1,2}(/|$)"
"""In the path of an object: empty parts, ``.`` and ``..``, which mean nothing to an object store."""


def scheme_of(url: str) -> str | None:
    """Returns a URL's protocol in small letters, or None for a local path."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else None


def locate(url: str) -> str:
    """Returns the absolute local path or the URL that a user's or a manifest's text names.

    Raises:
        InputError: if its protocol is not among those listed.
    """
    scheme = scheme_of(url)
    if scheme is None:
        return str(Path(url).expanduser().absolute())
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise InputError(f"{url} names no file of this machine: write file:///folder/file")
        return unquote(parts.path)
    if scheme not in OBJECT_SCHEMES:
        raise InputError(f"{url}: protocol {scheme}:// is not read: expected {EXPECTED}")
    return f"{scheme}{url[len(scheme) :]}"


def parent_of(url: str) -> str:
    """Returns the folder, or the URL without its last part and query, in which something lies."""
    if scheme_of(url) is None:
        return str(Path(url).parent)
    before_query = url.partition("?")[0] if url.startswith("http") else url
    start, _, name = before_query.rstrip("/").rpartition("/")
    return start if name and not start.endswith(("/", ":")) else before_query.rstrip("/")


def join(root: str, source: str) -> str:
    """Returns where a source lies that a manifest gives relative to ``root``: absolute ones stay what they are.

    Raises:
        InputError: if its protocol is not among those listed, or it climbs out of the root's bucket or host.
    """
    if scheme_of(source) is not None:
        return locate(source)
    if source.startswith("/") or scheme_of(root) is None:
        return str(Path(root, source))
    head = re.match(r"[a-z0-9]+://[^/]*", root)
    assert head is not None, root
    parts: list[str] = []
    for part in f"{root[head.end() :]}/{source}".split("/"):
        if part == ".." and not parts:
            raise InputError(f"{source}: leaves {head[0]}")
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join((head[0], *parts))


def split_bucket(url: str) -> tuple[str, str]:
    """Returns ``scheme://bucket`` and the key, or ``scheme://host`` and the path, of a URL of an object."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key
