"""A small cache with a history, and what it holds, whatever it lies in."""

from pathlib import Path
from typing import Any

import torch

from shared.cache.commit import ShardWriter
from shared.cache.committed import read_committed
from shared.cache.dataset import Cache, Provenance
from shared.cache.fragments import SHARED_KIND
from shared.cache.identity import text_id
from shared.cache.layout import Container
from shared.cache.ledger import Refusal, write_ledger
from shared.cache.null_caption import write_null_caption
from shared.cache.reader import StreamReader
from shared.cache.removal import remove_samples
from shared.cache.rows import Text, sample_row, shared_text_row, text_row
from shared.codec import Codec
from tests.shared.cache.conftest import BUCKET, PROVENANCE, ShardMaker, make_sample

CODEC = Codec.parse("bfloat16")
RECORD = {"clips_root": "clips", "environment": {"device": "cpu"}}
STREAMS: Provenance = {**PROVENANCE, "text.b": {**PROVENANCE["text.t5"], "model": "c", "weights_sha256": "33"}}


def embedding(number: int, tokens: int = 4) -> torch.Tensor:
    """Returns a text's embedding (L, D), the same for the same number."""
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1000 + number))


def text(caption: str, number: int) -> Text:
    """Returns a caption with its embedding."""
    return Text(id=text_id(caption), caption=caption, embedding=embedding(number))


def write_texts(
    url: str | Path, numbers: list[int], *, stream: str, shard_id: str, generation: int, container: Container = "tar"
) -> None:
    """Commits new texts of samples, in a shard of texts alone."""
    store = Cache.open(url).store
    record = {**RECORD, "kind": "samples"}
    with ShardWriter(store, shard_id=shard_id, folder=stream, container=container, record=record) as writer:
        for number in numbers:
            texts = [text(f"New caption of {number}", number)]
            writer.add(*text_row(f"{number:032x}", stream, texts, CODEC, generation))
        writer.commit()


def write_shared_texts(url: str | Path, *, shard_id: str, container: Container = "tar") -> None:
    """Commits two texts that samples share."""
    store = Cache.open(url).store
    record = {**RECORD, "kind": SHARED_KIND}
    with ShardWriter(store, shard_id=shard_id, folder="text.t5", container=container, record=record) as writer:
        for number in (1, 2):
            writer.add(*shared_text_row("text.t5", text(f"Shared {number}", -number), CODEC))
        writer.commit()


def write_sharing_samples(url: str | Path, numbers: list[int], *, shard_id: str, container: Container = "tar") -> None:
    """Commits samples whose texts are the shared ones."""
    cache = Cache.open(url)
    places = cache.shared_texts("text.t5")
    codecs = {"latent": CODEC, "text.t5": CODEC}
    record = {**RECORD, "kind": "samples"}
    with ShardWriter(cache.store, shard_id=shard_id, folder=str(BUCKET), container=container, record=record) as writer:
        for number in numbers:
            row, arrays = sample_row(make_sample(number), codecs, 0)
            captions = [f"Shared {1 + number % 2}"]
            texts = [Text(id=text_id(c), caption=c, embedding=places[text_id(c)]) for c in captions]
            row |= text_row(row["sample"], "text.t5", texts, CODEC, 0)[0]
            writer.add(row, {"latent": arrays["latent"]})
        writer.commit()


def make_edited_cache(url: str | Path, write_shard: ShardMaker, container: Container = "tar") -> Cache:
    """Returns a cache of samples 0, 1, 3 to 6: sample 2 was removed, 1 has a new caption, 4 and 5 share texts.

    Sample 6 was removed and encoded again. Samples 0 and 1 have texts in a stream that was added later.
    """
    Cache.open_or_create(url, PROVENANCE)
    write_shard(url, [0, 1, 2], shard_id="a" * 32, container=container)
    write_shard(url, [3], shard_id="b" * 32, container=container)
    write_shared_texts(url, shard_id="c" * 32, container=container)
    write_sharing_samples(url, [4, 5], shard_id="d" * 32, container=container)
    write_texts(url, [1], stream="text.t5", shard_id="e" * 32, generation=1, container=container)
    write_shard(url, [6], shard_id="f" * 32, container=container)
    remove_samples(Cache.open(url), [f"{number:032x}" for number in (2, 6)])
    write_shard(url, [6], shard_id="0" * 32, generation=1, container=container)
    cache = Cache.open_or_create(url, STREAMS)
    write_texts(url, [0, 1], stream="text.b", shard_id="1" * 32, generation=0, container=container)
    write_null_caption(cache.store, "text.t5", embedding(-5, 1))
    write_ledger(cache.store, [Refusal(source="bad.mp4", reason="not_a_video", detail="text")])
    return Cache.open(url)


def contents(cache: Cache) -> dict[str, Any]:
    """Returns what a cache holds: by sample its row without places, and its payloads."""
    reader = StreamReader(cache.store)

    def without_place(place: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in place.items() if name not in ("shard", "offset")}
        return {**kept, "payload": reader.payload(place)}

    found = {}
    for row in cache.read_index().to_pylist():
        row["latent"] = without_place(row["latent"])
        for stream in ("text.t5", "text.b"):
            if row.get(stream) is None:
                row.pop(stream, None)
            else:
                row[stream]["captions"] = [without_place(caption) for caption in row[stream]["captions"]]
        assert row["sample"] not in found
        found[row["sample"]] = row
    return found


def state(cache: Cache) -> tuple[Any, ...]:
    """Returns all that a planner and a reader see of a cache, but for where it lies."""
    removed = read_committed(cache, "text.t5").removed.by_sample()
    shared = {
        identity: StreamReader(cache.store).payload(place) for identity, place in cache.shared_texts("text.t5").items()
    }
    return contents(cache), removed, shared, cache.provenance, cache.read_ledger().to_pylist()


def shard_names(cache: Cache) -> set[str]:
    """Returns the paths of all shards that are there, live or not."""
    return {entry.path for entry in cache.store.list("shards")}
