"""The dataset card: a README inside the cache that says what it holds. For people; nothing reads it."""

from collections import Counter, defaultdict

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.spec import Bucket


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
    totals: dict[Bucket, Counter[str]] = defaultdict(Counter)
    sources = set()
    for row in cache.read_index(columns=columns).to_pylist():
        total = totals[Bucket(row["num_frames"], row["height"], row["width"])]
        entries = [caption for stream in texts if row.get(stream) for caption in row[stream]["captions"]]
        total.update(samples=1, latent_bytes=row["latent"]["bytes"], captions=len(entries))
        total.update(text_bytes=sum(caption["bytes"] for caption in entries))
        total.update(tokens=sum(caption["num_tokens"] for caption in entries))
        sources.add(row["source"])
    lines = [
        "# Cached latents and text embeddings",
        "",
        f"{sum(total['samples'] for total in totals.values()):,} samples of {len(sources):,} clips, in format version "
        f"{cache.version} of Latentmill. Written by the job that last added to it.",
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
