"""What the index promises of one shard: its members, and where in it each payload lies. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.cache.rows import Place, Row, payload_shape, places, streams_of
from shared.cache.schema import SHARED


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """The stored bytes of one array, as the index describes them."""

    offset: int
    num_bytes: int
    crc32c: int | None
    """None: not known."""
    codec: str
    shape: tuple[int, ...]
    """(C, T, H, W) or (L, D)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One sample's payloads of one stream."""

    key: str
    """The sample's identity, or that of a text that samples share."""
    stream: str
    payloads: tuple[Payload, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedShard:
    """What the index says of a shard."""

    shard: str
    """Below the cache's root."""
    index_path: str
    """Of the fragment or the snapshot that says so."""
    keys: tuple[str, ...]
    """The samples, in the shard's order."""
    members: tuple[Member, ...]
    is_whole: bool
    """Whether these are all that the shard holds: rows of a snapshot may lack what was superseded."""
    num_bytes: int | None = None
    sha256: str | None = None
    """Where a fragment records it; a shard's name has the first 16 digits in any case."""
    referred: frozenset[Payload] = field(default=frozenset())
    """Texts in it that rows of other shards name."""


def payload_of(row: Row, stream: str, place: Place) -> Payload:
    """Returns a place of a row as a payload.

    Raises:
        KeyError, TypeError: if the row lacks something.
    """
    crc32c = place["crc32c"]
    return Payload(
        offset=int(place["offset"]),
        num_bytes=int(place["bytes"]),
        crc32c=None if crc32c is None else int(crc32c),
        codec=str(place["codec"]),
        shape=tuple(int(size) for size in payload_shape(row, stream, place)),
    )


def key_of(row: Row) -> str:
    """Returns the name of a row's members in a shard."""
    return str(row[SHARED]["id"] if SHARED in row else row["sample"])


def row_streams(row: Row) -> list[str]:
    """Returns the streams of a row; texts that samples share are of the stream that their shard's folder names."""
    return [row[SHARED]["shard"].split("/")[1]] if SHARED in row else streams_of(row)


def home_of(row: Row) -> str | None:
    """Returns the shard that a row was written with, as far as the row tells: its latent's, or its first text's."""
    for stream in row_streams(row):
        for place in places(row, stream):
            return str(place["shard"])
    return None


def members_in(rows: Sequence[Row], shard: str) -> tuple[Member, ...]:
    """Returns what of the rows lies in a shard."""
    members = []
    for row in rows:
        for stream in row_streams(row):
            inside = [place for place in places(row, stream) if place["shard"] == shard]
            if inside:
                payloads = tuple(payload_of(row, stream, place) for place in inside)
                members.append(Member(key=key_of(row), stream=stream, payloads=payloads))
    return tuple(members)
