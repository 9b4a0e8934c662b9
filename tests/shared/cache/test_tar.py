"""Tar shards, as other readers see them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import zstandard

from shared.cache import layout, payload
from shared.cache.dataset import Cache
from shared.cache.reader import StreamReader
from shared.cache.shard_file import StoredArray
from shared.cache.tar import TarShardWriter
from shared.codec import Codec
from tests.shared.cache.conftest import PROVENANCE, ShardMaker, make_sample


def decode_as_documented(sample: dict) -> dict:
    """The decoder of docs/cache_format.md, word for word; a test below compares."""
    about = json.loads(sample["json"])
    latent, text = about["latent"], about["text.t5"]

    def tensor(payload: bytes, codec: str, shape: list[int]) -> torch.Tensor:
        values, zstd = codec.split("+")[0], codec.endswith("+zstd")
        width = 4 if values == "float32" else 2
        stored = zstandard.decompress(payload) if zstd else payload
        bits = np.frombuffer(stored, "u1" if zstd else f"<u{width}").reshape(-1, *shape)
        if zstd:  # byte planes, lowest first, of the bits with the sign moved to the lowest
            bits = sum(plane.astype(f"u{width}") << 8 * i for i, plane in enumerate(bits))
            bits = bits >> 1 | bits << 8 * width - 1
        return torch.from_numpy(bits.reshape(shape).copy()).view(getattr(torch, values))

    ends = np.cumsum(text["bytes"])
    payloads = [sample["text.t5"][end - size : end] for end, size in zip(ends, text["bytes"], strict=True)]
    shapes = [[tokens, text["channels"]] for tokens in text["num_tokens"]]
    texts = [tensor(part, text["codec"], shape) for part, shape in zip(payloads, shapes, strict=True)]  # (L, D) each
    latents = tensor(sample["latent"], latent["codec"], latent["shape"])  # (C, T, H, W)
    return {**about, **text, "key": sample["__key__"], "latent": latents, "texts": texts}


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "float16", "float32+zstd", "bfloat16+zstd", "float16+zstd"])
def test_plain_webdataset_reads_the_samples_with_the_documented_decoder(
    tmp_path: Path, write_shard: ShardMaker, codec: str
) -> None:
    Cache.open_or_create(tmp_path, PROVENANCE)
    write_shard(tmp_path, [0, 1, 2], shard_id="a" * 32, codec=codec)
    write_shard(tmp_path, [3], shard_id="b" * 32, codec=codec)
    shards = sorted(str(path) for path in tmp_path.glob("shards/*/*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).map(decode_as_documented)
    found = {sample["key"]: sample for sample in dataset}
    assert sorted(found) == [f"{number:032x}" for number in range(4)]
    dtype = payload.decoded_dtype(Codec.parse(codec))
    for number in range(4):
        expected, sample = make_sample(number), found[f"{number:032x}"]
        assert torch.equal(sample["latent"], expected.latent.to(dtype))
        for text, original in zip(sample["texts"], expected.texts["text.t5"], strict=True):
            assert isinstance(original.embedding, torch.Tensor)
            assert torch.equal(text, original.embedding.to(dtype))
        assert sample["captions"] == [text.caption for text in expected.texts["text.t5"]]
        assert sample["fps"] == expected.fps
        assert sample["manifest"] == expected.manifest


def test_the_documented_decoder_is_the_tested_one() -> None:
    source = Path(__file__).read_text()
    start = source.index("    about = json.loads")
    body = source[start : source.index("\n\n\n@pytest.mark.parametrize")]
    document = (Path(__file__).parents[3] / "docs/cache_format.md").read_text()
    assert f"def decode_as_documented(sample: dict) -> dict:\n{body}" in document
    assert len([line for line in body.splitlines() if line]) + 1 <= 20


@pytest.mark.parametrize("container", ["tar", "zarr"])
@pytest.mark.parametrize("codec", ["bfloat16", "bfloat16+zstd", "int8@45+delta+zstd", "int8@45"])
def test_our_reader_gives_what_was_written(tmp_path: Path, write_shard: ShardMaker, container: str, codec: str) -> None:
    cache = Cache.open_or_create(tmp_path, PROVENANCE)
    write_shard(tmp_path, [0, 1, 2], codec=codec, container=container)
    reader = StreamReader(cache.store)
    tolerance = 0 if codec.startswith("bfloat16") else 0.05
    rows = cache.read_index().to_pylist()
    assert [row["sample"] for row in rows] == [f"{number:032x}" for number in range(3)]
    for number, row in enumerate(rows):
        expected = make_sample(number)
        torch.testing.assert_close(reader.latent(row["latent"]), expected.latent.bfloat16(), atol=tolerance, rtol=0)
        for entry, original in zip(row["text.t5"]["captions"], expected.texts["text.t5"], strict=True):
            assert isinstance(original.embedding, torch.Tensor)
            found = reader.text(entry, row["text.t5"]["channels"])
            torch.testing.assert_close(found, original.embedding.bfloat16(), atol=tolerance, rtol=0)
        np.testing.assert_allclose(row["latent"]["mean"], expected.latent.mean((1, 2, 3)), atol=1e-6)


@pytest.mark.parametrize("container", ["tar", "zarr"])
def test_equal_samples_give_equal_bytes(tmp_path: Path, write_shard: ShardMaker, container: str) -> None:
    first = write_shard(tmp_path / "one", [1, 2], container=container)
    second = write_shard(tmp_path / "two", [1, 2], container=container)
    assert first.shard == second.shard
    assert (tmp_path / "one" / first.shard).read_bytes() == (tmp_path / "two" / second.shard).read_bytes()


@pytest.mark.parametrize("sizes", [[0], [1, 511, 512], [513] * 7, [10_240 - 1024 - 512]])
def test_the_size_of_a_tar_is_known_before_it_is_written(sizes: list[int]) -> None:
    file = io.BytesIO()
    writer = TarShardWriter(file)
    codec = Codec.parse("bfloat16")
    arrays = [
        StoredArray(payload=bytes([number]) * size, codec=codec, shape=(1, size)) for number, size in enumerate(sizes)
    ]
    streams = {f"text.m{number}": [array] for number, array in enumerate(arrays)}
    extents = writer.add("key", streams, b"{}")
    _, num_bytes = writer.finish()
    members = sum(layout.tar_member_bytes(size) for size in [*sizes, 2])
    assert num_bytes == len(file.getvalue()) == layout.tar_bytes(members)
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        assert [member.offset_data for member in tar][:-1] == [places[0].offset for places in extents.values()]
