"""``python -m preprocess.verify CACHE``: is all there that the index promises, byte for byte, and is it still video?"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import tyro

from preprocess.decode import decode_sample
from preprocess.plan import SampleTask
from shared.cache.check import check_files
from shared.cache.dataset import Cache
from shared.cache.layout import LATENT_STREAM
from shared.cache.ledger import Refusal
from shared.cache.reader import StreamReader
from shared.errors import InputError, run_entry_point
from shared.media.probe import probe
from shared.media.quality import psnr
from shared.media.video import MediaError, centre_window
from shared.spec import Bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Check a cache: counts, checksums, and a few latents decoded back to video and compared with their clips.

    Exit code 0: all is well (leftovers that no reader sees are named); 1: a fault was found; 2: not a cache.
    """

    cache: Annotated[Path, tyro.conf.Positional]
    """The cache's folder."""
    clips: Path | None = None
    """The folder from which the manifest's paths are taken. Without it, the one that the job recorded."""
    decode: int = 3
    """Latents to decode back to video, spread over the cache. 0: none, and no model is loaded."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        if self.decode < 0:
            raise InputError(f"--decode {self.decode}: expected 0 or more")


def verify(config: VerifyConfig) -> int:
    """Prints the findings and returns the number of faults.

    Raises:
        InputError: if there is no cache, or the VAE that it names is another or cannot be loaded.
    """
    cache = Cache.open(config.cache)
    num_faults = 0
    for finding in check_files(cache):
        num_faults += finding.is_fault
        print(f"{'FAULT' if finding.is_fault else 'note '}  {finding.path}: {finding.what}")
    if num_faults:
        print(f"{num_faults} faults in {len(cache.fragments())} shards")
        return num_faults
    index, ledger = cache.read_index(), cache.read_ledger()
    print(f"{len(index)} samples in {len(cache.fragments())} shards: counts, sizes and checksums as the index says")
    reasons = Counter(ledger["reason"].to_pylist())
    print(f"{len(ledger)} refused in the ledger" + "".join(f", {n} {reason}" for reason, n in reasons.most_common()))
    if config.decode and len(index):
        chosen = np.unique(np.linspace(0, len(index) - 1, config.decode).round().astype(int))
        for line in _decode_back(cache, index.take(chosen).to_pylist(), config.clips):
            print(line)
    return 0


def _decode_back(cache: Cache, rows: list[dict[str, Any]], clips: Path | None) -> Iterator[str]:
    from shared.encoders.vae import VideoAutoencoder  # torch and diffusers: not needed for the checks above

    ours = cache.provenance[LATENT_STREAM]
    vae = VideoAutoencoder.load(ours["model"], micro_batch=ours["micro_batch"])
    found = vae.provenance()["weights_sha256"]
    if found != ours["weights_sha256"]:
        raise InputError(
            f"VAE {ours['model']}: weights_sha256={found}: expected {ours['weights_sha256']}, which made {cache.root}: "
            "bring back those weights, or check without decoding by --decode 0"
        )
    roots = _clips_roots(cache)
    reader = StreamReader(cache.root)
    for row in rows:
        frames = vae.decode(reader.latent(row[LATENT_STREAM]))
        folder = clips or roots[row[LATENT_STREAM]["shard"]]
        original = _original(row, folder / row["source"])
        name = f"{row['source']} in {row['num_frames']}x{row['height']}x{row['width']}"
        if isinstance(original, str):
            yield f"{name}: decodes to video; not compared: {original}"
        else:
            yield f"{name}: decoded latent against the clip: {psnr(frames, original):.1f} dB PSNR"


def _clips_roots(cache: Cache) -> dict[str, Path]:
    roots = {}
    for fragment in cache.fragments():
        record = pq.read_metadata(fragment).metadata
        roots[record[b"shard"].decode()] = Path(record[b"clips_root"].decode())
    return roots


def _original(row: dict[str, Any], path: Path) -> np.ndarray | str:
    """Returns the frames that were encoded, or why they cannot be had."""
    bucket = Bucket(row["num_frames"], row["height"], row["width"])
    try:
        facts = probe(path)
    except MediaError as error:
        return f"{error} (--clips names the folder of the clips)"
    if facts.version != row["source_version"]:
        return f"{path} has changed since it was encoded"
    task = SampleTask(
        sample=row["sample"],
        source=row["source"],
        source_version=facts.version,
        path=path,
        captions=tuple(row["captions"]),
        window=centre_window(facts.num_frames, num_frames=bucket.num_frames, interval=row["frame_interval"]),
        fps=row["fps"],
    )
    frames = decode_sample(task, bucket)
    return frames.detail if isinstance(frames, Refusal) else frames


def main() -> int:
    """Returns 1 if a fault was found."""
    return min(verify(tyro.cli(VerifyConfig, prog="python -m preprocess.verify")), 1)


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
