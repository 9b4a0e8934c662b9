"""Zarr shards: what other libraries read from them, and where their payloads lie."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore
import torch
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore, ZipStore

from shared.cache.payload import decode, stored_array
from shared.cache.zarr_layout import (
    MeanStream,
    PayloadSize,
    SampleSize,
    ZipEntry,
    array_document,
    mean_zarr_shard_bytes,
    zarr_shard_bytes,
    zip_directory,
)
from shared.cache.zarr_zip import ZarrShardWriter, read_directory
from shared.codec import Codec
from tests.s3 import MotoS3, S3Server
from tests.shared.cache.zarr_samples import LATENT_SHAPE, Sample, make_samples, write

ROOT = Path(__file__).parents[3]
CODECS = [
    ("float32", "float32"),
    ("float32+zstd", "float32+zstd"),
    ("bfloat16", "bfloat16"),
    ("bfloat16+zstd", "bfloat16+zstd"),
    ("float16", "float16+zstd"),
    ("bfloat16+delta+zstd", "int8@25"),
    ("float32+delta+zstd", "float16"),
    ("int8@37", "int8@30"),
    ("int8@37+delta+zstd", "int8@30+zstd"),
]


def write_to(path: Path, samples: list[Sample]) -> Path:
    with open(path, "wb") as file:
        write(file, samples)
    return path


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a shard's group as any user of zarr-python does."""
    with ZipStore(path, mode="r") as store:
        yield zarr.open_group(store, mode="r")


def expected_arrays(samples: list[Sample]) -> dict[str, np.ndarray]:
    """Returns the stored array at each path of the shard's group."""
    texts = [text for sample in samples for text in sample.streams["text.t5"]]
    expected = {
        f"text.t5/{place}": stored_array(text.payload, text.codec, text.shape) for place, text in enumerate(texts)
    }
    latents = [array for sample in samples for array in sample.streams.get("latent", [])]
    if latents:
        expected["latent"] = np.stack([stored_array(array.payload, array.codec, array.shape) for array in latents])
    return expected


def check_group(group: zarr.Group, samples: list[Sample]) -> None:
    expected = expected_arrays(samples)
    found = {path: array for path, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}
    assert sorted(found) == sorted(expected)
    for path, array in found.items():
        assert array.dtype == expected[path].dtype
        np.testing.assert_array_equal(array[:], expected[path])


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with MotoS3() as server:
        yield server


@pytest.fixture
def s3_variables(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Sets what leads libraries to the server; returns what tensorstore needs besides."""
    for name, value in {**s3.environment, "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    return {"endpoint": s3.endpoint, "aws_region": "us-east-1"}


@pytest.mark.parametrize(("latent", "text"), CODECS)
def test_plain_zarr_reads_every_stored_array(tmp_path: Path, latent: str, text: str) -> None:
    samples = make_samples(latent, text)
    with opened(write_to(tmp_path / "shard.zarr.zip", samples)) as group:
        check_group(group, samples)
        assert group.attrs["format"] == "latentmill-shard"
        assert [entry["key"] for entry in group.attrs["samples"]] == [sample.key for sample in samples]
        places = [entry["streams"] for entry in group.attrs["samples"]]
        assert places == [
            {"latent": [0], "text.t5": [0]},
            {"latent": [1], "text.t5": [1, 2]},
            {"latent": [2], "text.t5": [3, 4, 5]},
        ]
        descriptions = [entry["description"] for entry in group.attrs["samples"]]
        assert descriptions == [json.loads(sample.description) for sample in samples]
        assert group["latent"].attrs.asdict() == {"codec": latent, "shape": list(LATENT_SHAPE)}
        shapes = [group[f"text.t5/{place}"].attrs["shape"] for place in range(6)]
        assert shapes == [list(array.shape) for sample in samples for array in sample.streams["text.t5"]]


@pytest.mark.parametrize(("latent", "text"), CODECS)
def test_tensorstore_reads_every_stored_array_by_its_path(tmp_path: Path, latent: str, text: str) -> None:
    samples = make_samples(latent, text)
    base = {"driver": "file", "path": str(write_to(tmp_path / "shard.zarr.zip", samples))}
    for path, expected in expected_arrays(samples).items():
        kvstore = {"driver": "zip", "base": base, "path": f"{path}/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()
        np.testing.assert_array_equal(array.read().result(), expected)


@pytest.mark.usefixtures("s3_variables")
def test_plain_zarr_reads_a_shard_on_s3(tmp_path: Path, s3: S3Server) -> None:
    samples = make_samples("int8@37+delta+zstd", "bfloat16+zstd")
    s3.client().upload_file(str(write_to(tmp_path / "shard", samples)), "bucket", "cache/remote.zarr.zip")
    import obstore.fsspec

    obstore.fsspec.register("s3")
    check_group(zarr.open_group("zip::s3://bucket/cache/remote.zarr.zip", mode="r"), samples)


def test_tensorstore_reads_a_shard_on_s3(tmp_path: Path, s3: S3Server, s3_variables: dict[str, str]) -> None:
    samples = make_samples("int8@37+delta+zstd", "bfloat16+zstd")
    s3.client().upload_file(str(write_to(tmp_path / "shard", samples)), "bucket", "cache/remote.zarr.zip")
    base = {"driver": "s3", "bucket": "bucket", "path": "cache/remote.zarr.zip", **s3_variables}
    for path, expected in expected_arrays(samples).items():
        kvstore = {"driver": "zip", "base": base, "path": f"{path}/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True, open=True).result()
        np.testing.assert_array_equal(array.read().result(), expected)


def documented_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/zarr.md").read_text(), re.DOTALL)


@pytest.mark.usefixtures("s3_variables")
@pytest.mark.parametrize(("latent", "text"), CODECS)
def test_the_documented_reader_gives_what_was_encoded(
    tmp_path: Path, latent: str, text: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_samples(latent, text)
    path = write_to(tmp_path / "shard.zarr.zip", expected)
    s3.client().upload_file(str(path), "bucket", "shard.zarr.zip")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    local, remote, with_tensorstore = documented_blocks()
    for block in (local, remote):
        exec(block, names)
        assert [sample["key"] for sample in names["samples"]] == [sample.key for sample in expected]
        for found, sample in zip(names.pop("samples"), expected, strict=True):
            assert found["source"] == json.loads(sample.description)["source"]
            arrays = [*sample.streams["latent"], *sample.streams["text.t5"]]
            for value, array in zip([found["latent"], *found["texts"]], arrays, strict=True):
                decoded = decode(array.payload, array.codec, array.shape)
                assert value.dtype == np.float32
                assert torch.equal(torch.from_numpy(value).to(decoded.dtype), decoded)
    exec(with_tensorstore, names)
    np.testing.assert_array_equal(names["caption"], expected_arrays(expected)["text.t5/0"])
    np.testing.assert_array_equal(names["latent"], expected_arrays(expected)["latent"][0])


@pytest.mark.parametrize(("latent", "text"), CODECS)
def test_extents_point_at_the_payloads(latent: str, text: str) -> None:
    samples, file = make_samples(latent, text), io.BytesIO()
    extents, (_, num_bytes) = write(file, samples)
    content = file.getvalue()
    assert num_bytes == len(content)
    for sample, places in zip(samples, extents, strict=True):
        assert list(places) == list(sample.streams)
        for stream, arrays in sample.streams.items():
            for array, extent in zip(arrays, places[stream], strict=True):
                payload = content[extent.offset : extent.offset + extent.num_bytes]
                assert payload == array.payload
                assert extent.crc32c == google_crc32c.value(payload)
                decoded = decode(payload, array.codec, array.shape)
                assert torch.equal(decoded, decode(array.payload, array.codec, array.shape))


def test_the_directory_gives_the_places_of_the_payloads_with_their_checksums(tmp_path: Path) -> None:
    samples = make_samples("bfloat16", "int8@30+zstd")
    with open(tmp_path / "shard", "w+b") as file:
        extents, _ = write(file, samples)
        directory = read_directory(file)
    first = extents[0]["latent"][0]
    assert directory["latent/c/0/0/0/0/0"] == (first.offset, first.num_bytes + 4)
    assert next(reversed(directory)) == "zarr.json"
    assert len(directory) == 3 + 6 + 1 + 1 + 6 + 1


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_the_metadata_is_what_zarr_python_writes_for_the_same_arrays() -> None:
    samples, file = make_samples("int8@37+delta+zstd", "bfloat16"), io.BytesIO()
    write(file, samples)
    ours = {
        name: json.loads(zipfile.ZipFile(file).read(name))
        for name in zipfile.ZipFile(file).namelist()
        if name.endswith("zarr.json")
    }
    store = MemoryStore()
    group = zarr.create_group(store, attributes=ours["zarr.json"]["attributes"])
    for path, array in expected_arrays(samples).items():
        group.create_array(
            path,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(1, *array.shape[1:]) if path == "latent" else array.shape,
            serializer=BytesCodec(endian=None if array.dtype == np.int8 else "little"),
            compressors=[ZstdCodec(level=3), Crc32cCodec()] if path == "latent" else [Crc32cCodec()],
            attributes=ours[f"{path}/zarr.json"]["attributes"],
        )
    zarr.consolidate_metadata(store)
    theirs = {
        name: json.loads(buffer.to_bytes()) for name, buffer in store._store_dict.items() if name.endswith("zarr.json")
    }
    assert ours == theirs


def test_opening_a_shard_needs_only_the_end_of_the_file(tmp_path: Path) -> None:
    samples = make_samples("float32", "float32")
    path = write_to(tmp_path / "shard.zarr.zip", samples)
    with open(path, "r+b") as file:
        offset, _ = read_directory(file)["latent/zarr.json"]
        file.seek(0)
        file.write(b"\0" * (offset - 30 - len("latent/zarr.json")))
    with opened(path) as group:
        assert group["text.t5/5"].shape == samples[2].streams["text.t5"][2].shape
        assert group.metadata.consolidated_metadata is not None


def test_a_flipped_bit_is_noticed_by_zarr_in_the_zip_and_unpacked(tmp_path: Path) -> None:
    path = write_to(tmp_path / "shard.zarr.zip", make_samples("bfloat16", "bfloat16"))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    chunk = tmp_path / "unpacked/text.t5/2/c/0/0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 4
    chunk.write_bytes(content)
    group: Any = zarr.open_group(tmp_path / "unpacked", mode="r")
    assert group["text.t5/1"][:].any()
    with pytest.raises(ValueError, match="checksum"):
        group["text.t5/2"][:]

    with open(path, "r+b") as file:
        offset, _ = read_directory(file)["text.t5/2/c/0/0"]
        file.seek(offset)
        file.write(content)
    with opened(path) as group, pytest.raises(zipfile.BadZipFile, match="CRC-32"):
        group["text.t5/2"][:]


def test_equal_samples_give_equal_bytes_in_any_process(tmp_path: Path) -> None:
    write_to(tmp_path / "here", make_samples("int8@37+delta+zstd", "bfloat16+zstd"))
    script = (
        "import sys; from pathlib import Path; from tests.shared.cache.test_zarr_zip import make_samples, write_to;"
        "write_to(Path(sys.argv[1]), make_samples('int8@37+delta+zstd', 'bfloat16+zstd'))"
    )
    zone = {**os.environ, "TZ": "Pacific/Auckland", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], cwd=ROOT, env=zone, check=True)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


def test_a_shard_is_written_front_to_back_and_hashed_on_the_way(tmp_path: Path) -> None:
    samples, whole = make_samples("float16", "float16"), io.BytesIO()
    _, (sha256, num_bytes) = write(whole, samples)
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        process = subprocess.Popen(["sha256sum"], stdin=reading, stdout=subprocess.PIPE, text=True)
        os.close(reading)
        assert write(pipe, samples)[1] == (sha256, num_bytes)
    assert process.communicate()[0].split()[0] == sha256
    assert num_bytes == len(whole.getvalue())


def test_a_shard_may_hold_texts_alone_and_a_sample_texts_without_a_latent(tmp_path: Path) -> None:
    samples = make_samples("bfloat16", "bfloat16+zstd")
    del samples[1].streams["latent"]
    with opened(write_to(tmp_path / "mixed", samples)) as group:
        check_group(group, samples)
        assert [sample["streams"].get("latent") for sample in group.attrs["samples"]] == [[0], None, [1]]
    del samples[0].streams["latent"], samples[2].streams["latent"]
    with opened(write_to(tmp_path / "texts", samples)) as group:
        check_group(group, samples)


def test_a_second_text_encoder_needs_nothing_new(tmp_path: Path) -> None:
    samples = make_samples("bfloat16", "int8@30")
    for sample in samples:
        sample.streams["text.clip"] = sample.streams["text.t5"][:1]
    with opened(write_to(tmp_path / "shard", samples)) as group:
        for number, sample in enumerate(samples):
            (text,) = sample.streams["text.clip"]
            expected = stored_array(text.payload, text.codec, text.shape)
            np.testing.assert_array_equal(group[f"text.clip/{number}"][:], expected)


def test_the_writer_refuses_what_its_callers_must_not_give() -> None:
    (sample,) = make_samples("bfloat16", "bfloat16", 1)
    (latent,), texts = sample.streams["latent"], sample.streams["text.t5"]
    (other,) = make_samples("float32", "bfloat16", 1)
    writer = ZarrShardWriter(io.BytesIO())
    with pytest.raises(AssertionError, match="without arrays"):
        writer.add(sample.key, {"latent": [latent], "text.t5": []}, b"{}")
    writer = ZarrShardWriter(io.BytesIO())
    writer.add(sample.key, {"latent": [latent], "text.t5": texts}, b"{}")
    with pytest.raises(AssertionError, match="others of the shard"):
        writer.add("1" * 32, other.streams, b"{}")
    with pytest.raises(AssertionError):
        writer.add("1" * 32, {"text.t5": texts}, b"[1]")


@pytest.mark.parametrize("num_samples", [1, 11, 101])
@pytest.mark.parametrize(("latent", "text"), [("bfloat16", "bfloat16+zstd"), ("int8@37+delta+zstd", "int8@30+zstd")])
def test_a_predicted_size_is_the_written_one(latent: str, text: str, num_samples: int) -> None:
    samples = make_samples(latent, text, num_samples)
    _, (_, num_bytes) = write(io.BytesIO(), samples)
    sizes = [
        SampleSize(
            streams={
                stream: [
                    PayloadSize(codec=array.codec, shape=array.shape, num_bytes=len(array.payload)) for array in arrays
                ]
                for stream, arrays in sample.streams.items()
            },
            description_bytes=len(sample.description),
        )
        for sample in samples
    ]
    assert zarr_shard_bytes(sizes) == num_bytes

    def mean(stream: str) -> MeanStream:
        arrays = [array for sample in samples for array in sample.streams[stream]]
        shape = tuple(round(sum(sides) / len(arrays)) for sides in zip(*(array.shape for array in arrays), strict=True))
        mean_bytes = sum(len(array.payload) for array in arrays) / len(arrays)
        arrays_per_sample = len(arrays) / num_samples
        return MeanStream(
            codec=arrays[0].codec, shape=shape, mean_bytes=mean_bytes, arrays_per_sample=arrays_per_sample
        )

    mean_description = sum(len(sample.description) for sample in samples) / num_samples
    streams = {stream: mean(stream) for stream in ("latent", "text.t5")}
    assert mean_zarr_shard_bytes(num_samples, streams, mean_description) == pytest.approx(num_bytes, rel=0.005)


def test_entries_beyond_4_gib_are_found_by_zipfile_and_by_tensorstore(tmp_path: Path) -> None:
    far, values = 5 << 30, np.array([[7, 8]], np.uint16)
    metadata = json.dumps(array_document(Codec.parse("bfloat16"), (1, 2))).encode()
    chunk = values.tobytes() + struct.pack("<L", google_crc32c.value(values.tobytes()))
    path, entries, place = tmp_path / "sparse.zip", [], 0
    with open(path, "wb") as file:
        for name, content in (("near", b"1"), ("a/zarr.json", metadata), ("a/c/0/0", chunk)):
            entries.append(ZipEntry(name=name, offset=place, num_bytes=len(content), crc32=zlib.crc32(content)))
            file.seek(place)
            file.write(entries[-1].local_header() + content)
            place = max(far, file.tell())
        file.write(zip_directory(entries, place))
    with open(path, "rb") as file:
        assert read_directory(file)["a/zarr.json"] == (far + 41, len(metadata))
        assert zipfile.ZipFile(file).read("a/c/0/0") == chunk
    kvstore = {"driver": "zip", "base": {"driver": "file", "path": str(path)}, "path": "a/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    np.testing.assert_array_equal(array.read().result(), values)


def test_more_entries_than_16_bits_count_are_all_found() -> None:
    file, entries = io.BytesIO(), []
    for number in range(65_600):
        entries.append(ZipEntry(name=f"{number}", offset=file.tell(), num_bytes=0, crc32=0))
        file.write(entries[-1].local_header())
    directory = zip_directory(entries, file.tell())
    file.write(directory)
    assert len(zipfile.ZipFile(file).namelist()) == 65_600
    assert struct.unpack_from("<2Q", directory, directory.rindex(b"PK\6\6") + 24) == (65_600, 65_600)
