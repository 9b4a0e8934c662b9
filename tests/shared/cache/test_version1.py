"""A cache of format version 1, as committed: read, and brought to version 2."""

import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache.compact import compact
from shared.cache.convert import convert
from shared.cache.dataset import Cache
from shared.errors import InputError
from tests.shared.cache.edited_cache import contents

VERSION1 = Path(__file__).parents[2] / "data" / "cache_v1"


def test_a_cache_of_version_1_is_read(tmp_path: Path) -> None:
    cache = Cache.open(VERSION1)
    samples = contents(cache)
    assert cache.version == 1
    assert len(samples) == 12
    assert all(len(row["latent"]["payload"]) == row["latent"]["bytes"] for row in samples.values())
    assert cache.read_ledger().num_rows > 0


@pytest.mark.parametrize("container", ["tar", "zarr"])
def test_version_1_becomes_version_2_with_checksums_and_codecs(tmp_path: Path, container: str) -> None:
    source = Cache.open(VERSION1)
    convert(source, str(tmp_path / "target"), container)
    target = Cache.open(tmp_path / "target")
    assert target.version == 2
    rows = target.read_index().to_pylist()
    assert {stream: entry["codec"] for stream, entry in target.provenance.items()} == {
        "latent": rows[0]["latent"]["codec"],
        "text.t5": rows[0]["text.t5"]["captions"][0]["codec"],
    }
    assert all(caption["crc32c"] is not None for row in rows for caption in row["text.t5"]["captions"])
    ours, theirs = contents(target), contents(source)
    for row in (*ours.values(), *theirs.values()):
        for caption in row["text.t5"]["captions"]:
            del caption["crc32c"]  # Version 1 has none where a sample has several captions.
    assert ours == theirs
    assert target.read_ledger().equals(source.read_ledger())


def test_version_1_with_several_codecs_in_a_stream_is_refused(tmp_path: Path) -> None:
    shutil.copytree(VERSION1, tmp_path / "source")
    path = next((tmp_path / "source" / "index").iterdir())
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["latent"]["codec"] = "float16"
    changed = pa.Table.from_pylist(rows, schema=table.schema)
    sink = io.BytesIO()
    pq.write_table(changed, sink)
    path.write_bytes(sink.getvalue())
    with pytest.raises(InputError, match="stream 'latent' has arrays in several codecs .*1 in float16"):
        convert(Cache.open(tmp_path / "source"), str(tmp_path / "target"), "tar")
    assert not (tmp_path / "target").exists()


def test_version_1_is_not_compacted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format version 1 has no snapshots: .* convert"):
        compact(Cache.open(VERSION1), 10**9)


@pytest.mark.parametrize(("recorded", "expected"), [(16, 16), (4, 4), (None, 16)])
def test_version_1_always_has_a_micro_batch(tmp_path: Path, recorded: int | None, expected: int) -> None:
    shutil.copytree(VERSION1, tmp_path / "cache")
    path = tmp_path / "cache" / "dataset.json"
    description = json.loads(path.read_text())
    del description["streams"]["latent"]["micro_batch"]
    if recorded is not None:
        description["streams"]["latent"]["micro_batch"] = recorded
    path.write_text(json.dumps(description))
    provenance = Cache.open(tmp_path / "cache").provenance
    assert provenance["latent"]["micro_batch"] == expected
    assert "micro_batch" not in provenance["text.t5"]
