"""Other loaders over the same samples, one measurement a process: ``PYTHON loader_rivals.py JSON``.

Imports nothing of this project, so that it runs in an environment where the rival is installed. All deliver what the
trainer needs: latents (B, C, T, H, W), captions padded to the longest (B, L, D), and their mask (B, L). The rivals are
set up as their documentation says: a DataLoader with worker processes, shuffling on.
"""

import glob
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

DTYPE = torch.bfloat16
Sample = dict[str, torch.Tensor]
_PREFETCH_FACTOR = 2
"""Batches that a DataLoader reads ahead, a worker."""


def decode(sample: dict[str, Any]) -> Sample:
    """Decodes a sample of plain webdataset, as docs/cache_format.md says; first caption, codec bfloat16."""
    about = json.loads(sample["json"])
    text = about["text.t5"]
    latent = torch.frombuffer(bytearray(sample["latent"]), dtype=DTYPE).reshape(about["latent"]["shape"])
    embedding = torch.frombuffer(bytearray(sample["text.t5"][: text["bytes"][0]]), dtype=DTYPE)
    return {"latent": latent, "caption": embedding.reshape(-1, text["channels"])}


def from_bytes(sample: dict[str, Any]) -> Sample:
    """Decodes a sample of MDS or litdata, which keep the same bytes and the shapes."""

    def tensor(name: str) -> torch.Tensor:
        values = torch.frombuffer(bytearray(sample[name]), dtype=DTYPE)
        return values.reshape([int(n) for n in sample[f"{name}_shape"].split("x")])

    return {"latent": tensor("latent"), "caption": tensor("caption")}


def collate(samples: list[Sample]) -> Sample:
    """Returns a batch."""
    captions = [sample["caption"] for sample in samples]
    length = max(map(len, captions))
    padded = captions[0].new_zeros(len(captions), length, captions[0].shape[1])
    mask = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, caption in enumerate(captions):
        padded[row, : len(caption)] = caption
        mask[row, : len(caption)] = 1
    return {"latents": torch.stack([sample["latent"] for sample in samples]), "captions": padded, "mask": mask}


def tar_samples(shards: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the samples of tar shards, as bytes."""
    import tarfile

    for shard in shards:
        with tarfile.open(shard) as tar:
            sample: dict[str, Any] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                if sample and sample["key"] != key:
                    yield sample
                    sample = {}
                sample["key"] = key
                sample[extension] = file.read()
            if sample:
                yield sample


def plain(sample: dict[str, Any]) -> dict[str, Any]:
    """Returns what MDS and litdata are given to store."""
    decoded = decode(sample)
    result: dict[str, Any] = {}
    for name, tensor in decoded.items():
        result[name] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        result[f"{name}_shape"] = "x".join(map(str, tensor.shape))
    return result


def read_webdataset(shards: list[str], folder: str, batch_size: int, num_workers: int) -> Iterable[Sample]:
    """Plain webdataset over the cache's own tar shards."""
    import webdataset as wds

    dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False, nodesplitter=None)
    dataset = dataset.shuffle(64).map(decode).batched(batch_size, collation_fn=collate, partial=False)
    return wds.WebLoader(dataset, batch_size=None, num_workers=num_workers)


def write_mds(shards: list[str], folder: str) -> None:
    """Writes the samples as MDS."""
    kinds = {"latent": "bytes", "caption": "bytes", "latent_shape": "str", "caption_shape": "str"}
    with importlib.import_module("streaming").MDSWriter(out=folder, columns=kinds) as writer:
        for sample in tar_samples(shards):
            writer.write(plain(sample))


def read_mds(shards: list[str], folder: str, batch_size: int, num_workers: int) -> Iterable[Sample]:
    """mosaicml-streaming."""
    importlib.import_module("streaming.base.util").clean_stale_shared_memory()
    base: Any = importlib.import_module("streaming").StreamingDataset

    class Decoded(base):
        def __getitem__(self, at: int) -> Sample:
            return from_bytes(super().__getitem__(at))

    dataset = Decoded(local=folder, shuffle=True, batch_size=batch_size)
    return torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate, drop_last=True
    )


def _litdata_sample(job: tuple[str, int, int]) -> Any:
    shard, _, _ = job
    for sample in tar_samples([shard]):
        yield plain(sample)


def write_litdata(shards: list[str], folder: str) -> None:
    """Writes the samples as litdata's chunks."""
    importlib.import_module("litdata").optimize(
        fn=_litdata_sample,
        inputs=[(shard, 0, 0) for shard in shards],
        output_dir=folder,
        chunk_bytes="64MB",
        num_workers=1,
    )


def read_litdata(shards: list[str], folder: str, batch_size: int, num_workers: int) -> Iterable[Sample]:
    """litdata."""
    litdata: Any = importlib.import_module("litdata")

    class Decoded(litdata.StreamingDataset):
        def __getitem__(self, at: Any) -> Sample:
            return from_bytes(super().__getitem__(at))

    dataset = Decoded(folder, shuffle=True, drop_last=True)
    return litdata.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)


READERS = {"webdataset": read_webdataset, "mosaicml-streaming": read_mds, "litdata": read_litdata}
WRITERS = {"mosaicml-streaming": write_mds, "litdata": write_litdata}


def drop_from_page_cache(folder: str) -> None:
    """Has the kernel forget the files of a folder, after making them durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(batches: Iterator[Any], *, ahead: int, cold: str | None, step_seconds: float = 0.0) -> dict[str, Any]:
    """Returns what reading the batches behind the first took.

    The clock starts when the first batch is there, and the workers wait with ``ahead`` more, which are not counted.

    Args:
        batches: With ``latents``, ``captions`` and ``mask`` as attributes or items.
        ahead: How many are read ahead.
        cold: A folder of which the kernel then forgets all files.
        step_seconds: How long each step computes.
    """

    def part(batch: Any, name: str) -> torch.Tensor:
        tensor: torch.Tensor = batch[name] if isinstance(batch, dict) else getattr(batch, name)
        return tensor

    next(batches)
    time.sleep(1.0)
    if cold is not None:
        drop_from_page_cache(cold)
    sizes, waits = [], []
    start = waiting_since = time.perf_counter()
    for batch in batches:
        waits.append(time.perf_counter() - waiting_since)
        captions = part(batch, "captions")
        valid = int(part(batch, "mask").sum()) * captions.shape[-1] * captions.element_size()
        sizes.append((len(captions), part(batch, "latents").nbytes + valid))
        time.sleep(step_seconds)
        waiting_since = time.perf_counter()
    seconds = waiting_since - start
    counted = sizes[ahead:]
    return {
        "samples": sum(samples for samples, _ in counted),
        "delivered_bytes": sum(num_bytes for _, num_bytes in counted),
        "seconds": seconds,
        "wait_seconds": waits,
    }


def measure(
    *, rival: str, task: str, cache: str, folder: str, batch_size: int, num_workers: int, cold: bool
) -> dict[str, Any]:
    """Returns what one epoch took; or writes the rival's own files (``task`` "write")."""
    shards = sorted(glob.glob(f"{cache}/shards/*/*.tar"))
    own = rival in WRITERS
    if task == "write":
        shutil.rmtree(folder, ignore_errors=True)
        if own:
            WRITERS[rival](shards, folder)
        return {}
    batches = iter(READERS[rival](shards, folder, batch_size, num_workers))
    return timed(batches, ahead=_PREFETCH_FACTOR * num_workers, cold=(folder if own else cache) if cold else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
    sys.stdout.flush()
    os._exit(0)
