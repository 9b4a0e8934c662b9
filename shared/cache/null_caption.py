"""The embedding of the empty caption, stored once a stream: what guidance and caption dropout need."""

import safetensors
import safetensors.torch
import torch

from shared.cache.layout import NULL_FOLDER
from shared.errors import InputError
from shared.stores.store import Store


def write_null_caption(store: Store, stream: str, embedding: torch.Tensor) -> None:
    """Stores the embedding (L, D) of the empty caption, unless it is there."""
    data = safetensors.torch.save({"embedding": embedding.detach().cpu().contiguous()}, {"caption": ""})
    store.write_if_absent(_path(stream), data)


def has_null_caption(store: Store, stream: str) -> bool:
    """Returns whether the embedding of the empty caption is stored."""
    return store.size(_path(stream)) is not None


def read_null_caption(store: Store, stream: str) -> torch.Tensor | None:
    """Returns the embedding (L, D) of the empty caption, or None if the cache was made without it (version 1).

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return safetensors.torch.load(store.read(_path(stream)))["embedding"]
    except FileNotFoundError:
        return None
    except (safetensors.SafetensorError, KeyError) as error:
        raise InputError(f"{store.url}/{_path(stream)}: not readable ({error}): run preprocess.verify") from None


def _path(stream: str) -> str:
    return f"{NULL_FOLDER}/{stream}.safetensors"
