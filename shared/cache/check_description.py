"""Opening a cache for a check: one whose description is damaged is opened too, so that the rest can be looked at."""

import json
from pathlib import Path

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.finding import Finding
from shared.cache.schema import FORMAT_VERSION
from shared.errors import InputError
from shared.stores.open import open_store
from shared.stores.store import Store

_REMEDY = "bring it back from a copy, nothing else knows it"


def open_for_check(url: str | Path) -> tuple[Cache, list[Finding]]:
    """Returns the cache and what is wrong with its description; then its provenance is empty.

    Raises:
        InputError: if there is no cache.
    """
    store = open_store(url)
    faults = [*_dataset_faults(store), *_stream_faults(store)]
    if not faults:
        return Cache.open(url), []
    if not any(store.list(layout.INDEX_FOLDER)):
        Cache.open(url)  # says what it is
    return Cache(store, {}, FORMAT_VERSION), faults


def _dataset_faults(store: Store) -> list[Finding]:
    what = ""
    try:
        Cache.open(store.url)
    except InputError as error:
        if not str(error).startswith(f"{store.url}/{layout.STREAM_FOLDER}/"):
            what = str(error).removeprefix(f"{store.url}/{layout.DATASET_FILE}: ").removeprefix(f"{store.url}: ")
    except (ValueError, KeyError, TypeError, AttributeError):  # Of version 1.
        what = "not the description of a cache"
    if not what and not json.loads(store.read(layout.DATASET_FILE))["streams"]:
        what = "it has no streams"
    return [Finding(path=layout.DATASET_FILE, what=f"{what}: {_REMEDY}")] if what else []


def _stream_faults(store: Store) -> list[Finding]:
    return [
        Finding(path=entry.path, what=f"not a JSON object, a stream's provenance: {_REMEDY}")
        for entry in store.list(layout.STREAM_FOLDER)
        if not _is_object(store, entry.path)
    ]


def _is_object(store: Store, path: str) -> bool:
    try:
        return isinstance(json.loads(store.read(path)), dict)
    except (ValueError, FileNotFoundError):
        return False
