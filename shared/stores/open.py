"""From what a user names to a store."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from shared.errors import InputError
from shared.stores.local import LocalStore
from shared.stores.store import Store

OBJECT_SCHEMES = ("s3", "gs", "az")


def open_store(url: str | Path) -> Store:
    """Returns the store at a folder or a URL; nothing is read or created yet.

    Args:
        url: A folder, ``file:///folder``, ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``.
            Endpoint and credentials come from the environment, see ``shared.stores.objects``.

    Raises:
        InputError: The URL is of no kind that is known here.
    """
    if isinstance(url, Path):
        return LocalStore(url)
    scheme, separator, _ = url.partition("://")
    if not separator:
        if not url:
            raise InputError("an empty path is no store: give a folder or s3://bucket/prefix")
        return LocalStore(Path(url).expanduser())
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise InputError(f"{url} names no folder of this machine: write file:///folder")
        return LocalStore(Path(unquote(parts.path)))
    if scheme not in OBJECT_SCHEMES:
        raise InputError(f"{url} is of an unknown kind: expected a folder, file://, s3://, gs:// or az://")
    from shared.stores.objects import ObjectStore  # Processes that only see folders start without its client.

    return ObjectStore(url)
