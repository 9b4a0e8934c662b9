"""Every fault that can be made is found and named."""

import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.cache.check import NONE, Part, Totals, check_files
from shared.cache.check_description import open_for_check
from shared.cache.commit import ShardWriter
from shared.cache.dataset import Cache
from shared.cache.finding import Finding
from shared.cache.identity import text_id
from shared.cache.layout import Container
from shared.cache.ledger import Refusal, write_ledger
from shared.cache.null_caption import write_null_caption
from shared.cache.reader import StreamReader
from shared.cache.rows import Text, shared_text_row
from shared.codec import Codec
from shared.errors import InputError
from tests.shared.cache.conftest import PROVENANCE, ShardMaker
from tests.shared.cache.damage import (
    add_to_tar,
    cut,
    edit_document,
    edit_zip,
    flip,
    fragment_of,
    latent_offset,
    path_of,
    recommit,
    rewrite_rows,
    shard_of,
)

Damage = Callable[[Cache], object]

VERSION_1 = Path(__file__).parents[2] / "data/cache_v1"
CONTAINERS: tuple[Container, ...] = ("tar", "zarr")


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> Container:
    return request.param


@pytest.fixture
def make_cache(tmp_path: Path, write_shard: ShardMaker) -> Callable[[Container], Cache]:
    """Makes a cache with all that a cache has: samples 0 to 2 in shard a, 3 in shard b, a shared text in shard d."""

    def make(container: Container) -> Cache:
        root = tmp_path / "whole"
        cache = Cache.open_or_create(root, PROVENANCE)
        write_shard(root, [0, 1, 2], shard_id="a" * 32, container=container)
        write_shard(root, [3], shard_id="b" * 32, container=container)
        record = {"kind": "texts", "clips_root": "clips", "environment": {}}
        with ShardWriter(
            cache.store, shard_id="d" * 32, folder="text.t5", container=container, record=record
        ) as writer:
            text = Text(id=text_id("shared"), caption="shared", embedding=torch.ones(4, 8))
            writer.add(*shared_text_row("text.t5", text, Codec(values="bfloat16")))
            writer.commit()
        write_null_caption(cache.store, "text.t5", torch.ones(1, 8))
        write_ledger(cache.store, [Refusal(source="x.mp4", reason="not_a_video", detail="a text")])
        return cache

    return make


def lines(findings: list[Finding]) -> list[str]:
    return [f"{finding.path}: {finding.what}" for finding in findings]


def faults(cache: Cache, **options: object) -> list[str]:
    opened, found = open_for_check(cache.url)
    return lines([*found, *(finding for finding in check_files(opened, **options) if finding.is_fault)])  # type: ignore[arg-type]


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def end_of(cache: Cache) -> int:
    return shard_of(cache).stat().st_size


def change_latent(cache: Cache, **values: object) -> None:
    rewrite_rows(cache, "b", lambda rows: [rows[0] | {"latent": rows[0]["latent"] | values}])


def rename_a_stream(cache: Cache) -> None:
    path = path_of(cache, "dataset.json")
    path.write_bytes(path.read_bytes().replace(b"text.t5", b"text.t6"))


BOTH: dict[str, tuple[Damage, str]] = {
    "a bit flipped in a latent": (lambda c: flip(shard_of(c), latent_offset(c) + 3), "latent of sample 0+ at offset"),
    "a bit flipped in a text": (
        lambda c: flip(shard_of(c), c.read_index()["text.t5"][1].as_py()["captions"][1]["offset"]),
        "text.t5 1 of sample 0+1 at offset .* checksum differs",
    ),
    "any byte": (lambda c: flip(shard_of(c), 200), "SHA-256"),
    "cut in data": (lambda c: cut(shard_of(c), latent_offset(c, row=1) + 9), "found 9 bytes, expected 96"),
    "cut in the middle": (lambda c: cut(shard_of(c), end_of(c) // 2), "bytes: expected"),
    "something behind its end": (lambda c: put(shard_of(c), shard_of(c).read_bytes() + b"x"), "bytes: expected"),
    "an empty shard": (lambda c: cut(shard_of(c), 0), "0 bytes: expected"),
    "a missing shard": (lambda c: shard_of(c).unlink(), "the shard is missing: index/a+.parquet names it"),
    "a missing shard of shared texts": (lambda c: shard_of(c, "d").unlink(), "d{32}.*the shard is missing"),
    "a shard under the name of another": (lambda c: put(shard_of(c), shard_of(c, "b").read_bytes()), "SHA-256"),
    "a row too few": (
        lambda c: rewrite_rows(c, "a", lambda rows: rows[1:]),
        "index/a+.parquet: does not fit its shard .*that the index does not know",
    ),
    "a row too many": (
        lambda c: rewrite_rows(c, "b", lambda rows: [*rows, rows[0] | {"sample": "f" * 32}]),
        r"index/b+.parquet: does not fit its shard .*(f{32}|missing latent/c/1)",
    ),
    "a row of another size": (
        lambda c: rewrite_rows(c, "b", lambda rows: [rows[0] | {"height": 32}]),
        "has bucket 2x32x24: its shard is shards/2x16x24",
    ),
    "a row of another shape": (
        lambda c: change_latent(c, shape=[2, 4, 2, 3]),
        r"shape \[2, 4, 2, 3\]: bucket and VAE make \[4, 4, 2, 3\]",
    ),
    "a row of another codec": (
        lambda c: change_latent(c, codec="float16"),
        "codec float16: its stream's is bfloat16",
    ),
    "a row of an unknown codec": (
        lambda c: change_latent(c, codec="pickle8"),
        "codec 'pickle8'",
    ),
    "a row of another shard": (
        lambda c: change_latent(c, shard="x.tar"),
        "rows name x.tar: expected only",
    ),
    "an identity that is none": (
        lambda c: rewrite_rows(c, "b", lambda rows: [rows[0] | {"sample": "../" + "0" * 29}]),
        "is no identity",
    ),
    "a truncated fragment": (
        lambda c: cut(fragment_of(c), fragment_of(c).stat().st_size // 2),
        "index/a+.parquet: not readable as a fragment",
    ),
    "an empty fragment": (lambda c: cut(fragment_of(c), 0), "index/a+.parquet: not readable as a fragment"),
    "garbage as a fragment": (lambda c: put(fragment_of(c), b"PAR1 no"), "index/a+.parquet: not readable"),
    "a flipped bit in a fragment's rows": (lambda c: flip(fragment_of(c), 30, 255), "index/a+.parquet: "),
    "a fragment under another name": (
        lambda c: put(fragment_of(c, "e"), fragment_of(c).read_bytes()),
        "index/e+.parquet: it names the shard .*: expected one of its own name e+",
    ),
    "a damaged snapshot": (
        lambda c: c.store.write("snapshots/000001.parquet", b"PAR1"),
        "snapshots/000001.parquet: not readable",
    ),
    "a damaged ledger": (
        lambda c: put(path_of(c, next(iter(c.store.list("refused"))).path), b"PAR1"),
        "refused/.*.parquet: not readable",
    ),
    "a damaged null caption": (
        lambda c: cut(path_of(c, "null/text.t5.safetensors"), 20),
        "null/text.t5.safetensors: not readable",
    ),
    "a null caption that is not finite": (
        lambda c: (
            path_of(c, "null/text.t5.safetensors").unlink(),
            write_null_caption(c.store, "text.t5", torch.full((1, 8), torch.nan)),
        ),
        "null/text.t5.safetensors: values that are not finite",
    ),
    "a null caption of another width": (
        lambda c: (
            path_of(c, "null/text.t5.safetensors").unlink(),
            write_null_caption(c.store, "text.t5", torch.ones(1, 9)),
        ),
        r"null/text.t5.safetensors: shape \(1, 9\)",
    ),
    "a truncated dataset.json": (lambda c: cut(path_of(c, "dataset.json"), 50), "dataset.json: not the description"),
    "a dataset.json that is gone": (lambda c: path_of(c, "dataset.json").unlink(), "dataset.json: found no dataset"),
    "a dataset.json of other streams": (
        rename_a_stream,
        "stream 'text.t5' is not in dataset.json",
    ),
    "a damaged stream": (lambda c: c.store.write("streams/text.clip.json", b"{"), "streams/text.clip.json: not a JSON"),
}  # fmt: skip


def tar_end(cache: Cache) -> int:
    with tarfile.open(shard_of(cache)) as tar:
        return max(member.offset_data + -(-member.size // 512) * 512 for member in tar)


def json_offset(cache: Cache) -> int:
    with tarfile.open(shard_of(cache)) as tar:
        return next(member.offset_data for member in tar if member.name.endswith(".json"))


TAR: dict[str, tuple[Damage, str]] = {
    "cut at a member": (lambda c: cut(shard_of(c), latent_offset(c, row=1) - 512), "found no two zero blocks"),
    "cut in a header": (lambda c: cut(shard_of(c), latent_offset(c, row=1) - 412), "not readable as tar"),
    "cut in a first header": (lambda c: cut(shard_of(c), 100), "not readable as tar"),
    "cut before its end": (lambda c: cut(shard_of(c), tar_end(c)), "not readable as tar: found no two zero blocks"),
    "a bit flipped in a header": (lambda c: flip(shard_of(c), latent_offset(c, row=1) - 500), "3 of 9 members"),
    "a bit flipped in padding": (lambda c: flip(shard_of(c), latent_offset(c, row=1) - 513), "SHA-256"),
    "a bit flipped in the JSON": (lambda c: flip(shard_of(c), json_offset(c), 128), "not readable as JSON"),
    "a member that leads out": (lambda c: add_to_tar(c, "../evil"), "'../evil' leads out"),
    "an absolute member": (lambda c: add_to_tar(c, "/etc/passwd"), "'/etc/passwd' leads out"),
    "a member in a folder": (lambda c: add_to_tar(c, "a/b.json"), "'a/b.json' leads out"),
    "a symbolic link": (lambda c: add_to_tar(c, "f.latent", tarfile.SYMTYPE), "'f.latent' is a link"),
    "a hard link": (lambda c: add_to_tar(c, "f.latent", tarfile.LNKTYPE), "'f.latent' is a link"),
    "a device": (lambda c: add_to_tar(c, "f.latent", tarfile.CHRTYPE), "'f.latent' is a link, a device"),
    "a doubled member": (lambda c: add_to_tar(c, f"{0:032x}.latent"), "latent' stands in it twice"),
    "a member too many": (lambda c: add_to_tar(c, "f.pickle"), "9 of 9 members, and 1 .*unknown f.pickle"),
    "an offset that is wrong": (
        lambda c: change_latent(c, offset=513),
        "lies at 512, 96 bytes: the index says 513, 96",
    ),
}


def set_object_type(document: dict) -> None:
    document["data_type"] = "object"


def set_pickle_codec(document: dict) -> None:
    document["codecs"] = [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]


def set_shape(document: dict) -> None:
    document["shape"][0] += 1


def rename_sample(document: dict) -> None:
    document["attributes"]["samples"][0]["key"] = "f" * 32


def drop_a_chunk(entries: list[tuple[str, bytes]]) -> None:
    del entries[[name for name, _ in entries].index("latent/c/1/0/0/0/0")]


def flip_a_checksum(cache: Cache) -> None:
    data = bytearray(shard_of(cache).read_bytes())
    data[latent_offset(cache) + 96] ^= 1
    recommit(cache, "a", bytes(data))


def directory_of(cache: Cache) -> int:
    with zipfile.ZipFile(shard_of(cache)) as archive:
        return archive.start_dir


ZARR: dict[str, tuple[Damage, str]] = {
    "cut in the directory": (lambda c: cut(shard_of(c), end_of(c) - 60), "not a readable zip file"),
    "the directory damaged": (lambda c: flip(shard_of(c), directory_of(c)), "not a readable zip file"),
    "the end record damaged": (lambda c: flip(shard_of(c), end_of(c) - 22), "not a readable zip file"),
    "a local header damaged": (lambda c: flip(shard_of(c), 0), "has no header where the directory says"),
    "a name damaged": (lambda c: flip(shard_of(c), 31), "in its own header"),
    "a chunk missing": (lambda c: edit_zip(c, drop_a_chunk), "missing latent/c/1/0/0/0/0"),
    "an entry too many": (lambda c: edit_zip(c, lambda e: e.append(("x.pickle", b"."))), "unknown x.pickle"),
    "an entry that leads out": (lambda c: edit_zip(c, lambda e: e.append(("../x", b"."))), "not a relative path"),
    "an absolute entry": (lambda c: edit_zip(c, lambda e: e.append(("/x", b"."))), "not a relative path"),
    "a doubled entry": (lambda c: edit_zip(c, lambda e: e.append(e[0])), "twice"),
    "an object array": (lambda c: edit_document(c, "latent/zarr.json", set_object_type), "'object'.*not opened"),
    "a pickle codec": (lambda c: edit_document(c, "latent/zarr.json", set_pickle_codec), "pickle.*not opened"),
    "a shape that is wrong": (lambda c: edit_document(c, "latent/zarr.json", set_shape), "zarr-python finds"),
    "a text's shape that is wrong": (
        lambda c: edit_document(c, "text.t5/0/zarr.json", set_shape),
        "text.t5/0/zarr.json describes another array",
    ),
    "another sample's name": (lambda c: edit_document(c, "zarr.json", rename_sample), "attributes name other samples"),
    "metadata that is no JSON": (
        lambda c: edit_zip(c, lambda e: e.__setitem__(-1, ("zarr.json", b"{"))),
        "metadata is not readable as Zarr",
    ),
    "Zarr's checksum damaged": (flip_a_checksum, "the checksum behind it is not the index's"),
}  # fmt: skip

CASES = [
    *(pytest.param(kind, *case, id=f"{kind}: {name}") for name, case in BOTH.items() for kind in CONTAINERS),
    *(pytest.param("tar", *case, id=f"tar: {name}") for name, case in TAR.items()),
    *(pytest.param("zarr", *case, id=f"zarr: {name}") for name, case in ZARR.items()),
]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_sound_cache_has_no_findings(make_cache: Callable[[Container], Cache], container: Container) -> None:
    totals = Totals()
    assert list(check_files(make_cache(container), totals=totals)) == []
    assert (totals.num_samples, totals.num_shards, totals.num_read) == (4, 3, 3)


@pytest.mark.parametrize(("container", "damage", "expected"), CASES)
def test_a_fault_is_found_and_named(
    make_cache: Callable[[Container], Cache], container: Container, damage: Damage, expected: str
) -> None:
    cache = make_cache(container)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile's, of doubled names
        damage(cache)
    found = faults(cache)
    assert any(re.search(expected, fault) for fault in found), "\n".join(found)
    assert all("\n" not in fault for fault in found)


def test_leftovers_and_superseded_shards_are_notes(cache: Cache, write_shard: ShardMaker) -> None:
    folder = shard_of(cache).parent
    (folder / ".tmp-123-abc").write_bytes(b"half a shard")
    (folder / f"{'e' * 32}-0123456789abcdef.tar").write_bytes(b"an orphan")
    write_shard(cache.url, [3], shard_id="f" * 32, generation=1)
    findings = list(check_files(cache))
    assert not any(finding.is_fault for finding in findings)
    text = "\n".join(lines(findings))
    for expected in ("left by a writer", "no fragment names this shard", "superseded or removed", "also in other frag"):
        assert expected in text
    shard_of(cache, "b").unlink()
    assert faults(cache) == []


def test_a_committed_cache_of_version_1_is_sound() -> None:
    cache, found = open_for_check(VERSION_1)
    assert [*found, *check_files(cache)] == []


def test_a_part_of_the_shards_is_read_and_all_are_looked_for(cache: Cache) -> None:
    flip(shard_of(cache), latent_offset(cache))
    totals = Totals()
    assert lines(list(check_files(cache, part=NONE, totals=totals)))[1:] == []
    assert (totals.num_read, totals.num_shards) == (0, 2)
    by_seed = [len(faults(cache, part=Part(num_shards=1, seed=seed))) > 0 for seed in range(12)]
    assert {*by_seed} == {True, False}
    assert by_seed == [len(faults(cache, part=Part(num_shards=1, seed=seed))) > 0 for seed in range(12)]
    cut(shard_of(cache, "b"), 1000)
    assert any("1000 bytes: expected" in fault for fault in faults(cache, part=NONE))


def test_several_workers_find_the_same(cache: Cache) -> None:
    flip(shard_of(cache), latent_offset(cache))
    flip(shard_of(cache, "b"), latent_offset(cache, "b"))
    assert faults(cache, num_workers=4) == faults(cache, num_workers=1)


def test_a_reader_names_shard_and_offset_of_a_corrupt_payload(cache: Cache) -> None:
    entry = cache.read_index()["latent"][0].as_py()
    flip(shard_of(cache), entry["offset"] + 1)
    with pytest.raises(InputError, match=rf"{'a' * 32}-.*, offset {entry['offset']}: found CRC32C .* corrupt"):
        StreamReader(cache.store).latent(entry)


def test_a_reader_names_a_shard_that_is_cut_short(cache: Cache) -> None:
    entry = cache.read_index()["latent"][1].as_py()
    cut(shard_of(cache), entry["offset"] + 10)
    with pytest.raises(InputError, match="found 10 bytes, expected .*cut short"):
        StreamReader(cache.store).latent(entry)
