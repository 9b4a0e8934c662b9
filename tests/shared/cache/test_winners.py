"""Which rows count, over numbers: the same as over whole rows."""

import numpy as np
import pyarrow as pa
import pytest

from shared.cache import winners
from shared.cache.resolve import resolve
from shared.cache.winners import RowNumbers, winning_rows

STREAMS = ("latent", "text.t5", "text.clip")


def random_rows(generator: np.random.Generator, num_rows: int, num_samples: int) -> pa.Table:
    """Returns rows of which many are of the same samples, some without a latent or texts, some removals."""
    number = pa.array(np.arange(num_rows))
    samples = [f"{i % 3:016x}{i:016x}" for i in range(num_samples)]
    columns = {"sample": pa.array([samples[i] for i in generator.integers(num_samples, size=num_rows)])}
    removes = generator.random(num_rows) < 0.1
    for stream in STREAMS:
        generations = pa.array(generator.integers(3, size=num_rows).astype(np.int32))
        mask = pa.array(removes | (generator.random(num_rows) < 0.3))
        columns[stream] = pa.StructArray.from_arrays([generations, number], ["generation", "row"], mask=mask)
    columns["removed"] = pa.array(generator.integers(2, size=num_rows).astype(np.int32), mask=~removes)
    return pa.table(columns)


@pytest.mark.parametrize("num_samples", [3, 40, 5000])
@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_the_same_rows_win_as_where_whole_rows_are_resolved(
    num_samples: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winners, "_RESOLVED_AT_ONCE", at_once)
    table = random_rows(np.random.default_rng(num_samples), 300, num_samples)
    parts = [RowNumbers.of_table(table.slice(start, 100), STREAMS) for start in (0, 100, 200)]
    found = winning_rows(RowNumbers.joined(parts, STREAMS))
    expected = resolve(table)
    for stream in STREAMS:
        rows = [-1 if value is None else value["row"] for value in expected[stream].to_pylist()]
        assert found[stream].tolist() == rows


def test_no_row_at_all_has_no_winner() -> None:
    found = winning_rows(RowNumbers.joined([], STREAMS))
    assert {stream: rows.tolist() for stream, rows in found.items()} == {stream: [] for stream in STREAMS}


def test_identities_are_written_as_they_were_read() -> None:
    samples = pa.array([f"{i * 0x9E3779B97F4A7C15 << 40:032x}" for i in range(5)])
    numbers = RowNumbers.of_table(pa.table({"sample": samples}), STREAMS)
    assert numbers.samples(np.array([4, 0, 2])).to_pylist() == [samples[i].as_py() for i in (4, 0, 2)]
