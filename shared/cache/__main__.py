"""``python -m shared.cache convert|compact|gc|urls|refused``: parse, run, exit code."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from shared.cache.layout import Container
from shared.errors import InputError, run_entry_point
from shared.wording import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """Copy a cache into the other container, or from or to an object store; run again, it goes on where it was."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """The cache's folder or URL; also of format version 1."""
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
    """A new folder or URL."""
    container: Container
    """Of the new shards: WebDataset tars, or Zarr v3 groups in zip files."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> int:
        """Converts, and prints what was done."""
        from shared.cache.convert import convert
        from shared.cache.dataset import Cache

        num_written, num_present = convert(Cache.open(self.source), self.target, self.container)
        print(f"{self.target}: {counted(num_written, 'shard')} written, {num_present:,} were there")
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Compact:
    """Merge small shards into large ones and the index into one snapshot. Jobs and readers may be at work."""

    cache: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CACHE")]
    """The cache's folder or URL."""
    shard_bytes: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "1GB"
    """Size of a merged shard at most, such as 256MB. Shards above a quarter of it stay as they are."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> int:
        """Compacts, and prints what was done."""
        from shared.cache.compact import compact, parse_bytes
        from shared.cache.dataset import Cache

        print(compact(Cache.open(self.cache), parse_bytes(self.shard_bytes)))
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gc:
    """Delete what no reader needs: orphans, what compaction left over, temporary files. Jobs may be at work."""

    cache: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CACHE")]
    """The cache's folder or URL."""
    older_than: Annotated[str, tyro.conf.arg(metavar="AGE")] = "24h"
    """Nothing younger is deleted, nor what a reader needs that opened the cache since: longer than any job or run
    takes from reading the index to its end. Such as 90m, 24h, 7d."""
    dry_run: bool = False
    """Say what would be deleted."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> int:
        """Sweeps, and prints what was done."""
        from shared.cache.dataset import Cache
        from shared.cache.sweep import parse_age, sweep

        print(sweep(Cache.open(self.cache), parse_age(self.older_than), dry_run=self.dry_run))
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Urls:
    """Print the committed shards with samples, one a line, for other readers such as webdataset."""

    cache: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CACHE")]
    """The cache's folder or URL."""
    bucket: Annotated[str | None, tyro.conf.arg(metavar="TxHxW")] = None
    """Only of this bucket, FRAMESxHEIGHTxWIDTH."""
    json: bool = False
    """A line of JSON a shard, with its samples and bytes."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> int:
        """Prints the shards; what plain readers would get wrong goes to stderr."""
        from shared.cache.dataset import Cache
        from shared.cache.urls import live_shards, warnings
        from shared.spec import Bucket

        bucket = None if self.bucket is None else Bucket.parse(self.bucket)
        shards = live_shards(Cache.open(self.cache), bucket)
        if not shards:
            raise InputError(f"{self.cache}: found no samples{f' of bucket {self.bucket}' if self.bucket else ''}")
        for shard in shards:
            print(shard.json() if self.json else shard.url)
        for line in warnings(shards):
            print(f"note: {line}", file=sys.stderr)
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Print the ledger: clips and rows of manifests that could not be encoded, one a line, each with its reason."""

    cache: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CACHE")]
    """The cache's folder or URL."""
    reason: Annotated[str | None, tyro.conf.arg(metavar="REASON")] = None
    """Only of this reason, e.g. missing."""
    json: bool = False
    """A line of JSON each, with the file's version, and bucket and sample where they apply."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def run(self) -> int:
        """Prints reason, source and what was found, sorted, with tabs between them."""
        from shared.cache.dataset import Cache
        from shared.cache.ledger import ledger_lines

        for line in ledger_lines(Cache.open(self.cache).read_ledger(), self.reason, as_json=self.json):
            print(line)
        return 0


COMMANDS: Any = (
    Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Compact, tyro.conf.subcommand("compact")]
    | Annotated[Gc, tyro.conf.subcommand("gc")]
    | Annotated[Urls, tyro.conf.subcommand("urls")]
    | Annotated[Refused, tyro.conf.subcommand("refused")]
)


def main() -> int:
    """Returns 0."""
    return tyro.cli(COMMANDS, prog="python -m shared.cache").run()


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
