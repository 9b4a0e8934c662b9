"""The embedding of the empty caption, stored once a stream: what guidance and caption dropout need."""

import safetensors
import safetensors.torch
import torch

from shared.cache.layout import null_caption_file
from shared.errors import InputError
from shared.stores.store import Store


def write_null_caption(store: Store, stream: str, embedding: torch.Tensor) -> None:
    """Stores the embedding (L, D) of the empty caption, unless it is there."""
    data = safetensors.torch.save({"embedding": embedding.detach().cpu().contiguous()}, {"caption": ""})
    store.write_if_absent(null_caption_file(stream), data)


def read_null_caption(store: Store, stream: str) -> torch.Tensor | None:
    """Returns the embedding (L, D) of the empty caption, or None if the cache was made without it (version 1).

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return safetensors.torch.load(store.read(null_caption_file(stream)))["embedding"]
    except FileNotFoundError:
        return None
    except (safetensors.SafetensorError, KeyError) as error:
        raise InputError(
            f"{store.url}/{null_caption_file(stream)}: not readable ({error}): run preprocess.verify"
        ) from None
