"""What an estimate looks like: as a table for people, as JSON for machines."""

from dataclasses import dataclass
from typing import Any

from storage_estimates.estimate import SampleBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way of storing the same samples."""

    name: str
    sample: SampleBytes
    num_samples: int

    @property
    def total_bytes(self) -> int:
        """Of all samples."""
        return round(self.sample.total * self.num_samples)


def terabytes(num_bytes: float) -> str:
    """Returns a size in decimal units, as disks are sold: 51.8 TB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.1f} PB"


def table(rows: list[Row]) -> str:
    """Returns the rows as text: bytes a sample, and all together."""
    header = ("", "text", "latent", "overhead", "bytes a sample", "total")
    cells = [
        (
            row.name,
            *(f"{round(part):,}" for part in (row.sample.text, row.sample.latent, row.sample.overhead)),
            f"{round(row.sample.total):,}",
            terabytes(row.total_bytes),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in [header, *cells])
    )


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Returns the rows as plain values."""
    return [
        {
            "name": row.name,
            "num_samples": row.num_samples,
            "text_bytes": round(row.sample.text),
            "latent_bytes": round(row.sample.latent),
            "overhead_bytes": round(row.sample.overhead),
            "sample_bytes": round(row.sample.total),
            "total_bytes": row.total_bytes,
        }
        for row in rows
    ]
