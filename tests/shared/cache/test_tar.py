"""Tar shards, as other readers see them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.reader import StreamReader
from shared.cache.tar import TarShardWriter
from tests.shared.cache.conftest import ShardMaker, make_sample


def decode_as_documented(sample: dict) -> dict:
    """The decoder of docs/cache_format.md, word for word; a test below compares."""
    about = json.loads(sample["json"])
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

    def tensor(stream: str, shape: list[int]) -> torch.Tensor:
        return torch.frombuffer(bytearray(sample[stream]), dtype=types[about[stream]["codec"]]).reshape(shape)

    text = about["text.t5"]
    tokens = tensor("text.t5", [sum(text["num_tokens"]), text["channels"]])
    return {
        "key": sample["__key__"],
        "latent": tensor("latent", about["latent"]["shape"]),  # (C, T, H, W)
        "texts": list(tokens.split(text["num_tokens"])),  # one (L, D) a caption
        "captions": about["captions"],
        "fps": about["fps"],
    }


def test_plain_webdataset_reads_the_samples_with_the_documented_decoder(cache: Cache) -> None:
    shards = sorted(str(path) for path in cache.root.glob("shards/*/*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).map(decode_as_documented)
    found = {sample["key"]: sample for sample in dataset}
    assert sorted(found) == [f"{number:032x}" for number in range(4)]
    for number in range(4):
        expected, sample = make_sample(number), found[f"{number:032x}"]
        assert torch.equal(sample["latent"], expected.latent.bfloat16())
        assert [text.shape for text in sample["texts"]] == [(3, 8), (5, 8)]
        assert torch.equal(torch.cat(sample["texts"]), torch.cat(expected.texts).bfloat16())
        assert tuple(sample["captions"]) == expected.captions
        assert sample["fps"] == expected.fps


def test_the_documented_decoder_is_the_tested_one() -> None:
    source = Path(__file__).read_text()
    start = source.index("    about = json.loads")
    body = source[start : source.index("\n\n\ndef test_plain_webdataset")]
    document = (Path(__file__).parents[3] / "docs/cache_format.md").read_text()
    assert body in document
    assert body.count("\n") + 2 <= 20


def test_our_reader_gives_what_was_written(cache: Cache) -> None:
    reader = StreamReader(cache.root)
    rows = cache.read_index().to_pylist()
    assert [row["sample"] for row in rows] == [f"{number:032x}" for number in range(4)]
    for number, row in enumerate(rows):
        expected = make_sample(number)
        assert torch.equal(reader.latent(row["latent"]), expected.latent.bfloat16())
        for text, original in zip(reader.text(row["text.t5"]), expected.texts, strict=True):
            assert torch.equal(text, original.bfloat16())
        np.testing.assert_allclose(row["latent"]["mean"], expected.latent.mean((1, 2, 3)), atol=1e-6)


def test_equal_samples_give_equal_bytes(tmp_path: Path, write_shard: ShardMaker) -> None:
    first = write_shard(tmp_path / "one", [1, 2])
    second = write_shard(tmp_path / "two", [1, 2])
    assert first.shard == second.shard
    assert (tmp_path / "one" / first.shard).read_bytes() == (tmp_path / "two" / second.shard).read_bytes()


@pytest.mark.parametrize("sizes", [[0], [1, 511, 512], [513] * 7, [10_240 - 1024 - 512]])
def test_the_size_of_a_tar_is_known_before_it_is_written(sizes: list[int]) -> None:
    file = io.BytesIO()
    writer = TarShardWriter(file)
    extents = writer.add("key", {f"m{number}": bytes([number]) * size for number, size in enumerate(sizes)})
    _, num_bytes = writer.finish()
    assert num_bytes == len(file.getvalue()) == layout.tar_bytes(sum(layout.tar_member_bytes(size) for size in sizes))
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        assert [member.offset_data for member in tar] == [extent.offset for extent in extents.values()]
