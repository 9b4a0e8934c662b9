"""``python -m preprocess.verify CACHE``: is all there that the index promises, byte for byte, and is it still video?"""

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from preprocess.decoded_pictures import write_picture
from preprocess.originals import Originals
from shared.cache.check import Part, Totals, check_files
from shared.cache.check_description import open_for_check
from shared.cache.dataset import Cache
from shared.cache.finding import Finding
from shared.cache.layout import LATENT_STREAM
from shared.cache.reader import StreamReader
from shared.cache.repair import repair
from shared.errors import InputError, run_entry_point
from shared.media.quality import psnr
from shared.media.urls import locate, scheme_of
from shared.wording import counted

_REPAIRS = 3
"""Rounds: what a lost file of the index covered may be broken too."""
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check a cache: its index, every byte of its shards, and a few latents decoded back to video beside their clips.

    Exit code 0: all is well (leftovers and superseded shards are named as notes); 1: a fault was found; 2: not a cache.
    """

    cache: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")]
    """The cache: a folder, or s3://bucket/prefix, gs:// or az://."""
    sample: Annotated[str | None, tyro.conf.arg(metavar="N|P%")] = None
    """Read only so many of the shards, e.g. 20 or 1%, chosen by chance. The index is checked whole in any case."""
    seed: int = 0
    """Of that choice: another one reads other shards."""
    clips: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|URL")] = None
    """The folder or URL from which the manifest's paths are taken. Without it, the one that the job recorded."""
    decode: int = 3
    """Latents to decode back to video, spread over the cache. 0: none, and no model is loaded."""
    pictures: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write a picture of each of these there: frames of the clip, and below them those decoded."""
    deep: int = 0
    """Samples to encode again from their clips and captions and to compare, spread over the cache."""
    repair: bool = False
    """Drop what is broken, so that the next job makes it anew. Nothing sound is lost."""
    workers: int = 2
    """Shards that are checked at once; up to twice as many are in memory."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        for name, least in (("decode", 0), ("deep", 0), ("workers", 1)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"--{name} {value}: expected {least} or more")
        if self.pictures is not None and not self.decode:
            raise InputError(f"--pictures {self.pictures} does nothing with --decode 0: nothing is decoded")
        if self.clips is not None and not self.decode and not self.deep:
            raise InputError(f"--clips {self.clips} does nothing with --decode 0 and no --deep: no clip is looked at")
        self.part()

    def part(self) -> Part:
        """Returns which shards to read."""
        if self.sample is None:
            return Part()
        if match := _PERCENT.fullmatch(self.sample):
            fraction = float(match[1]) / 100
            if 0 < fraction <= 1:
                return Part(fraction=fraction, seed=self.seed)
        elif self.sample.isdecimal() and int(self.sample):
            return Part(num_shards=int(self.sample), seed=self.seed)
        raise InputError(f"--sample {self.sample}: expected a number of shards such as 20, or a part such as 1%")


def verify(config: VerifyConfig) -> int:
    """Prints the findings and returns the number of faults that are left.

    Raises:
        InputError: if there is no cache, or the models that it names are others or cannot be loaded.
    """
    if config.clips is not None:
        _require_folder(config.clips)
    cache, faults = open_for_check(config.cache)
    totals, started = Totals(), time.monotonic()
    for finding in faults:
        _print(finding)
    for finding in check_files(cache, part=config.part(), num_workers=config.workers, totals=totals):
        _print(finding)
        if finding.is_fault:
            faults.append(finding)
    print(_summary(config, totals, time.monotonic() - started))
    for _ in range(_REPAIRS if config.repair else 0):
        for line in repair(cache, faults):
            print(f"REPAIR {line}")
        cache, faults = open_for_check(config.cache)
        faults += [finding for finding in check_files(cache, part=Part(num_shards=0)) if finding.is_fault]
        for finding in faults:
            _print(finding)
        if not faults:
            break
    if faults:
        print(f"{counted(len(faults), 'fault')}" + ("" if config.repair else ": --repair drops what is broken"))
        return len(faults)
    ledger = cache.read_ledger()
    reasons = Counter(ledger["reason"].to_pylist())
    print(f"{len(ledger)} refused in the ledger" + "".join(f", {n} {reason}" for reason, n in reasons.most_common()))
    return _compare(config, cache)


def _require_folder(clips: str) -> None:
    """Raises :class:`InputError` if clips are to be looked for in a folder that is not there."""
    place = locate(clips)
    if scheme_of(place) is None and not Path(place).is_dir():
        raise InputError(f"--clips {clips}: no such folder: expected the one from which the manifest's paths are taken")


def _print(finding: Finding) -> None:
    print(f"{'FAULT' if finding.is_fault else 'note '}  {finding.path}: {finding.what}")


def _summary(config: VerifyConfig, totals: Totals, seconds: float) -> str:
    line = f"{counted(totals.num_samples, 'sample')} in {counted(totals.num_shards, 'shard')}"
    if totals.num_read < totals.num_shards:
        asked = "" if config.sample is None else f" (--sample {config.sample}, --seed {config.seed})"
        line += f"; read {totals.num_read} of the shards{asked}"
    else:
        line += "; read all"
    line = f"{line}, {totals.read_bytes / 1e6:,.1f} MB, and the whole index"
    return f"{line}, at {totals.read_bytes / 1e6 / seconds:,.0f} MB/s" if seconds > 1 else line


def _compare(config: VerifyConfig, cache: Cache) -> int:
    """Returns how many samples are not what encoding gives."""
    index = cache.read_index() if config.decode or config.deep else None
    if index is None or not len(index):
        return 0
    originals = Originals(cache, config.clips)
    if config.decode:
        for line in _decode_back(cache, _spread(index, config.decode), originals, config.pictures):
            print(line)
    if not config.deep:
        return 0
    from preprocess.deep import encode_again  # torch, transformers and diffusers

    verdicts = Counter[str]()
    for verdict in encode_again(cache, _spread(index, config.deep), originals):
        verdicts[verdict.kind] += 1
        print(f"{'FAULT' if verdict.is_fault else 'deep '}  {verdict.line}")
    print("encoded again: " + ", ".join(f"{count} {kind}" for kind, count in verdicts.items()))
    return verdicts["differ"]


def _spread(index: Any, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = index.take(
        np.unique(np.linspace(0, len(index) - 1, count).round().astype(int))
    ).to_pylist()
    return rows


def _decode_back(
    cache: Cache, rows: list[dict[str, Any]], originals: Originals, pictures: Path | None
) -> Iterator[str]:
    from shared.encoders.vae import VideoAutoencoder  # torch and diffusers: not needed for the checks above

    ours = cache.provenance[LATENT_STREAM]
    vae = VideoAutoencoder.load(ours["model"], micro_batch=ours["micro_batch"])
    found = vae.provenance()["weights_sha256"]
    if found != ours["weights_sha256"]:
        raise InputError(
            f"VAE {ours['model']}: weights_sha256={found}: expected {ours['weights_sha256']}, which made {cache.url}: "
            "bring back those weights, or check without decoding by --decode 0"
        )
    reader = StreamReader(cache.store)
    for row in rows:
        latent = reader.latent(row[LATENT_STREAM])
        mean_or_sample = latent[: ours["latent_channels"]]  # without the logarithm of the variance
        frames = vae.decode(mean_or_sample, row["num_frames"])
        original = originals.frames(row)
        name = f"{row['source']} in {row['num_frames']}x{row['height']}x{row['width']}"
        if isinstance(original, str):
            line = f"{name}: decodes to video; not compared: {original}"
        else:
            line = f"{name}: decoded latent against the clip: {psnr(frames, original):.1f} dB PSNR"
        if pictures is not None:
            place = write_picture(pictures, row, frames, None if isinstance(original, str) else original)
            line += f"; {place}"
        yield line


def main() -> int:
    """Returns 1 if a fault was found."""
    return min(verify(tyro.cli(VerifyConfig, prog="python -m preprocess.verify")), 1)


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
