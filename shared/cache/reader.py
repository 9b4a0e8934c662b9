"""Reading single payloads out of shards, by the places that the index gives."""

from typing import Any

import google_crc32c
import torch

from shared.cache import payload
from shared.codec import Codec
from shared.errors import InputError
from shared.stores.store import Store


class StreamReader:
    """Reads and checks payloads; needs to know nothing of containers. Cheap to build and to pickle."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def payload(self, place: dict[str, Any]) -> bytes:
        """Returns the stored bytes of one array.

        Args:
            place: As the index gives it: ``shard``, ``offset``, ``bytes``, ``crc32c`` (None: not known).

        Raises:
            InputError: naming shard and offset, if the shard is missing or short, or the checksum differs.
        """
        try:
            data = self._store.read_range(place["shard"], place["offset"], place["bytes"])
        except FileNotFoundError:
            raise InputError(f"{self._where(place)}: the shard is missing: run preprocess.verify") from None
        return self.checked(place, data)

    def checked(self, place: dict[str, Any], data: bytes) -> bytes:
        """Returns ``data`` if it is what the index says of a place.

        Raises:
            InputError: naming shard and offset, if it is short or its checksum differs.
        """
        if len(data) != place["bytes"]:
            raise InputError(
                f"{self._where(place)}: found {len(data)} bytes, expected {place['bytes']}: the shard is cut short"
            )
        expected = place["crc32c"]
        if expected is not None and (found := google_crc32c.value(data)) != expected:
            raise InputError(
                f"{self._where(place)}: found CRC32C {found:08x}, expected {expected:08x}: the shard is corrupt"
            )
        return data

    def latent(self, place: dict[str, Any]) -> torch.Tensor:
        """Returns a latent (C, T, H, W), or (2C, T, H, W), normalised as the provenance says."""
        return payload.decode(self.payload(place), Codec.parse(place["codec"]), place["shape"])

    def text(self, place: dict[str, Any], channels: int) -> torch.Tensor:
        """Returns the embedding (L, D) of one caption, without padding.

        Args:
            place: An entry of a text stream's ``captions``.
            channels: Width D, from the stream's struct.
        """
        return payload.decode(self.payload(place), Codec.parse(place["codec"]), (place["num_tokens"], channels))

    def _where(self, place: dict[str, Any]) -> str:
        return f"{self._store.url}/{place['shard']}, offset {place['offset']}"
