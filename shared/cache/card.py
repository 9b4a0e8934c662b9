"""The dataset card: a README inside the cache that says what it holds. For people; nothing reads it."""

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.spec import Bucket
from shared.wording import counted


def write_card(cache: Cache) -> None:
    """Writes the card anew, from the index, if it says something else now."""
    text = card(cache).encode()
    if cache.store.size(layout.CARD_FILE) != len(text) or cache.store.read(layout.CARD_FILE) != text:
        cache.store.write(layout.CARD_FILE, text)


def card(cache: Cache) -> str:
    """Returns the card of a cache as Markdown."""
    texts = [stream for stream in cache.provenance if layout.is_text(stream)]
    columns = ["num_frames", "height", "width", "source", "latent.bytes"]
    columns += [f"{stream}.captions.list.element.{name}" for stream in texts for name in ("bytes", "num_tokens")]
    table = cache.read_index(columns=columns)
    totals: dict[Bucket, Counter[str]] = defaultdict(Counter)
    for batch in table.to_batches() if table.num_rows else []:
        _count(pa.table(batch), texts, totals)
    num_samples = sum(total["samples"] for total in totals.values())
    lines = [
        "# Cached latents and text embeddings",
        "",
        f"{counted(num_samples, 'sample')} of {counted(_num_sources(table), 'clip')}, in format "
        f"version {cache.version} of Latentmill. Written by the job that last added to it.",
        "",
        "| bucket | samples | latents, bytes each | captions each | tokens a caption | texts, bytes each |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for bucket, total in sorted(totals.items()):
        samples, captions = total["samples"], total["captions"]
        cells = (
            *(str(bucket), f"{samples:,}", f"{total['latent_bytes'] / samples:,.0f}", f"{captions / samples:.2f}"),
            *(f"{total['tokens'] / max(captions, 1):.1f}", f"{total['text_bytes'] / samples:,.0f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    for stream, provenance in cache.provenance.items():
        lines += ["", f"## Stream `{stream}`", "", "| | |", "|---|---|"]
        lines += [f"| {name} | `{value}` |" for name, value in provenance.items()]
    lines += [
        "",
        "Check it by `python -m preprocess.verify`, train from it by `python -m train --cache`. Its shards are "
        "WebDataset tars or Zarr v3 groups in zip files; docs/cache_format.md describes every byte.",
    ]
    return "\n".join(lines) + "\n"


def _num_sources(table: pa.Table) -> int:
    return int(pc.count_distinct(table["source"]).as_py()) if table.num_rows else 0


def _count(table: pa.Table, texts: list[str], totals: dict[Bucket, Counter[str]]) -> None:
    """Adds some rows of the index to the totals of their buckets."""
    sizes = np.stack([table[name].to_numpy() for name in ("num_frames", "height", "width")], axis=1)
    buckets, numbers = np.unique(sizes, axis=0, return_inverse=True)
    rows = numbers.reshape(-1)
    latent = table[layout.LATENT_STREAM].combine_chunks().field("bytes").to_numpy()
    counted = {"samples": np.ones(len(rows)), "latent_bytes": latent}
    for stream in (stream for stream in texts if stream in table.column_names):
        captions = table[stream].combine_chunks().field("captions")
        owners = pc.list_parent_indices(captions).to_numpy()
        entries = captions.flatten()
        for name, values in (
            ("captions", np.ones(len(entries))),
            ("text_bytes", entries.field("bytes").to_numpy()),
            ("tokens", entries.field("num_tokens").to_numpy()),
        ):
            counted[name] = counted.get(name, 0) + np.bincount(owners, weights=values, minlength=len(rows))
    for number, size in enumerate(buckets.tolist()):
        chosen = rows == number
        totals[Bucket(*size)].update({name: int(values[chosen].sum()) for name, values in counted.items()})
