"""What an answer looks like: as text for people, as JSON and CSV for machines."""

import csv
import io
import textwrap
from collections.abc import Sequence
from typing import Any

from shared.wording import counted
from storage_estimates.answer import LOSSLESS, Answer
from storage_estimates.break_even import Cost, dollars, together
from storage_estimates.estimate import CacheSize, Choice
from storage_estimates.prices import Prices

_WIDTH = 118
"""Columns of the first screen, at most."""

PUBLISHED = """\
Open-Sora's published figures for 10,000,000 clips of 64 frames at 512x512, and how they arise
  a caption   120 tokens x 4096 channels x 2 bytes (16 bits, padded to the limit)       983,040 bytes   "1 MB"
  a latent    64 frames x 64 x 64 places x 4 channels x 4 bytes (float32)             4,194,304 bytes   "4 MB"
  all clips   5,177,344 bytes x 10,000,000                                                51.8 TB      "50 TB"
"""


def terabytes(num_bytes: float) -> str:
    """Returns a size in decimal units, as disks are sold: 51.8 TB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.1f} PB"


def text(answer: Answer) -> str:
    """Returns the first screen."""
    parts = [PUBLISHED, _samples(answer), _sizes(answer), _prices(answer), _costs(answer)]
    return "\n".join([*parts, textwrap.fill(f"Recommendation: {answer.recommendation}", _WIDTH)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Returns rows as aligned text; the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        (
            indent
            + "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        ).rstrip()
        for line in [header, *rows]
    )


def long_table(sizes: Sequence[tuple[str, CacheSize]], prices: Prices, storage: str) -> str:
    """Returns the sizes of many presets and choices, with shards and objects; each with its preset's label."""
    rows = [
        (
            label,
            f"{size.choice.latent_codec} | {size.choice.text_codec}",
            size.choice.container,
            size.choice.posterior,
            *_size_cells(size),
            f"{size.num_shards:,}",
            dollars(prices.storage[storage].month(size.total_bytes)),
        )
        for label, size in sizes
    ]
    header = ("autoencoder", "latents | texts", "container", "stored", *_SIZE_HEADER, "shards", "$ a month")
    return table(header, rows, indent="")


_SIZE_HEADER = ("text", "latent", "overhead", "a sample", "total")


def _size_cells(size: CacheSize) -> tuple[str, ...]:
    parts = (size.text_bytes, size.latent_bytes, size.overhead_bytes, size.total_bytes)
    return (*(f"{round(part / size.num_samples):,}" for part in parts), terabytes(size.total_bytes))


def _samples(answer: Answer) -> str:
    num_samples = sum(group.num_samples for group in answer.groups)
    geometry = answer.encoders.geometry
    every = "every frame" if geometry.temporal_stride == 1 else f"{geometry.temporal_stride} frames a latent frame"
    lines = [
        f"Your samples: {num_samples:,} in {_buckets(answer)}, captions of {_mean_tokens(answer):g} tokens "
        f"(limit {answer.encoders.max_tokens}) and {answer.encoders.text_channels} channels",
        f"Autoencoder: {answer.encoders.vae}, {geometry.latent_channels} channels, {geometry.spatial_stride}x"
        f"{geometry.spatial_stride} pixels a place, {every}",
        *answer.notes,
        *(
            f"  {stream} as {codec}: {bits.per_value:.2f} bits a value at {bits.sqnr_db:.1f} dB"
            for stream, codec, bits in answer.bits
            if bits.sqnr_db is not None
        ),
    ]
    return "\n".join(lines) + "\n"


def _buckets(answer: Answer) -> str:
    named = [str(group.bucket) for group in answer.groups]
    return named[0] if len(named) == 1 else f"{len(named)} buckets from {named[0]} to {named[-1]}"


def _mean_tokens(answer: Answer) -> float:
    captions = sum(group.num_samples * group.num_captions for group in answer.groups)
    tokens = sum(group.num_samples * group.num_captions * group.num_tokens for group in answer.groups)
    return round(tokens / captions, 1)


def choice_name(choice: Choice) -> str:
    """Returns the codecs of latents and texts, and whether both moments are stored."""
    both = ", mean+logvar" if choice.posterior == "mean+logvar" else ""
    return f"{choice.latent_codec} | {choice.text_codec}{both}"


def _sizes(answer: Answer) -> str:
    storage = answer.terms.storage
    rows = [
        (
            ("> " if size is answer.chosen else "  ") + choice_name(size.choice),
            *_size_cells(size),
            f"{size.num_shards:,}",
            dollars(storage.month(size.total_bytes)),
        )
        for size in answer.sizes
    ]
    header = ("  latents | texts", *_SIZE_HEADER, "shards", "a month")
    chosen = answer.chosen
    files = counted(chosen.num_objects, "file or object", "files or objects")
    return (
        f"Bytes of a sample in a cache ({chosen.choice.container}), and of all; a month on {storage.label}\n"
        + table(header, rows, indent="")
        + f"\n  Unless told otherwise preprocess writes {LOSSLESS[0]}, which loses nothing; int8@40 keeps 40 dB."
        + f"\n  The way marked > is costed below: {files}.\n"
    )


def _prices(answer: Answer) -> str:
    total = answer.chosen.total_bytes
    cells = [f"{each.label} {dollars(each.month(total))}" for each in answer.prices.storage.values()]
    return textwrap.fill(f"A month of it: {', '.join(cells)}", _WIDTH, subsequent_indent="  ") + "\n"


def _costs(answer: Answer) -> str:
    terms = answer.terms
    rows = []
    named: list[tuple[str, Cost]] = [(cost.stream, cost) for cost in answer.costs]
    for name, cost in [*named, ("both", together(answer.costs))]:
        after = cost.break_even_epochs()
        rows.append(
            (
                name,
                _hours(cost.encode_hours),
                _hours(cost.encode_hours * terms.epochs),
                dollars(cost.encoding),
                dollars(cost.storing),
                dollars(cost.reading * terms.epochs),
                dollars(cost.cached(terms.epochs)),
                dollars(cost.online(terms.epochs)),
                "never" if after is None else f"{after:.1f} epochs",
            )
        )
    header = (
        "",
        "GPU h once",
        f"x {counted(terms.epochs, 'epoch')}",
        "encode",
        "store",
        "read",
        "cached",
        "online",
        "pays after",
    )
    where = "read from elsewhere" if terms.egress else "read in the same region"
    lines = [
        f"Does it pay? {counted(terms.epochs, 'epoch')} on {terms.gpu}s at {dollars(terms.gpu_hour)} an hour; "
        f"{counted(terms.months, 'month')} on {terms.storage.label}, {where}",
        table(header, rows),
    ]
    lines.append("  In GPU hours a cache pays from the second epoch on; 'pays after' counts storage and reading too.")
    if answer.step_shares:
        shares = " and ".join(f"{stream} {share:.1%}" for stream, share in answer.step_shares)
        lines.append(f"  Encoding while training adds to a step of STDiT-XL/2: {shares}.")
    return "\n".join(lines) + "\n"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:,.1f}"


def as_json(answer: Answer) -> dict[str, Any]:
    """Returns the answer as plain values."""
    terms = answer.terms
    return {
        "num_samples": sum(group.num_samples for group in answer.groups),
        "published": {"caption_bytes": 983_040, "latent_bytes": 4_194_304, "total_bytes": 51_773_440_000_000},
        "autoencoder": answer.encoders.vae,
        "buckets": [
            {
                "bucket": str(group.bucket),
                "num_samples": group.num_samples,
                "mean_tokens": group.num_tokens,
                "mean_captions": group.num_captions,
            }
            for group in answer.groups
        ],
        "notes": list(answer.notes),
        "sizes": [size_json(answer.encoders.vae, size, answer.prices) for size in answer.sizes],
        "chosen": size_json(answer.encoders.vae, answer.chosen, answer.prices),
        "bits_a_value": [
            {"stream": stream, "codec": codec, "bits": bits.per_value, "sqnr_db": bits.sqnr_db, "source": bits.source}
            for stream, codec, bits in answer.bits
        ],
        "costs": [
            {
                "stream": cost.stream,
                "gpu": terms.gpu,
                "rate_source": cost.rate.source,
                "gpu_hours_once": cost.encode_hours,
                "gpu_hours_online": cost.encode_hours * terms.epochs,
                "encode_dollars": cost.encoding,
                "store_dollars": cost.storing,
                "read_dollars_an_epoch": cost.reading,
                "cached_dollars": cost.cached(terms.epochs),
                "online_dollars": cost.online(terms.epochs),
                "break_even_epochs": cost.break_even_epochs(),
                "step_share": dict(answer.step_shares).get(cost.stream),
            }
            for cost in answer.costs
        ],
        "epochs": terms.epochs,
        "months": terms.months,
        "storage": terms.storage.name,
        "gpu_hour_dollars": terms.gpu_hour,
        "break_even_epochs_of_both": together(answer.costs).break_even_epochs(),
        "recommendation": answer.recommendation,
    }


def size_json(vae: str, size: CacheSize, prices: Prices) -> dict[str, Any]:
    """Returns what one way of storing takes as plain values."""
    return {
        "autoencoder": vae,
        "latent_codec": str(size.choice.latent_codec),
        "text_codec": str(size.choice.text_codec),
        "container": size.choice.container,
        "posterior": size.choice.posterior,
        "text_bytes": round(size.text_bytes / size.num_samples),
        "latent_bytes": round(size.latent_bytes / size.num_samples),
        "overhead_bytes": round(size.overhead_bytes / size.num_samples),
        "sample_bytes": round(size.total_bytes / size.num_samples),
        "total_bytes": round(size.total_bytes),
        "num_shards": size.num_shards,
        "num_objects": size.num_objects,
        **{f"month_dollars_{name}": round(each.month(size.total_bytes), 2) for name, each in prices.storage.items()},
    }


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows of equal keys as CSV with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
