"""Which rows of the index count."""

import time

import numpy as np
import pyarrow as pa
import pytest

from shared.cache.resolve import resolve, sample_numbers
from shared.errors import InputError


def table(*rows: dict) -> pa.Table:
    """Returns rows ``{"sample": number, "latent": generation, "text.t5": generation, "removed": generation}``."""
    struct = pa.struct([("generation", pa.int32()), ("shard", pa.string())])
    columns: dict[str, list] = {"sample": [], "latent": [], "text.t5": [], "removed": []}
    for number, row in enumerate(rows):
        columns["sample"].append(f"{row['sample']:032x}")
        columns["removed"].append(row.get("removed"))
        for stream in ("latent", "text.t5"):
            generation = row.get(stream)
            columns[stream].append(None if generation is None else {"generation": generation, "shard": f"row {number}"})
    types = {"sample": pa.string(), "latent": struct, "text.t5": struct, "removed": pa.int32()}
    return pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})


def counted(*rows: dict) -> list[tuple[int, str, str | None]]:
    """Returns of each sample that is there: its number, and the rows that give its latent and its texts."""
    return [
        (int(row["sample"], 16), row["latent"]["shard"], row["text.t5"] and row["text.t5"]["shard"])
        for row in resolve(table(*rows)).to_pylist()
    ]


BOTH = {"latent": 0, "text.t5": 0}


def test_distinct_samples_all_count_in_their_order() -> None:
    rows = [{"sample": number, **BOTH} for number in (3, 1, 2)]
    assert counted(*rows) == [(3, "row 0", "row 0"), (1, "row 1", "row 1"), (2, "row 2", "row 2")]


def test_of_equal_generations_the_first_row_counts() -> None:
    assert counted({"sample": 1, **BOTH}, {"sample": 2, **BOTH}, {"sample": 1, **BOTH}) == [
        (1, "row 0", "row 0"),
        (2, "row 1", "row 1"),
    ]


def test_new_texts_replace_the_texts_and_leave_the_latent() -> None:
    rows = [{"sample": 1, "text.t5": 2}, {"sample": 1, **BOTH}, {"sample": 1, "text.t5": 1}, {"sample": 2, **BOTH}]
    assert counted(*rows) == [(1, "row 1", "row 0"), (2, "row 3", "row 3")]


def test_texts_without_their_sample_do_not_count() -> None:
    assert counted({"sample": 1, "text.t5": 1}, {"sample": 2, **BOTH}) == [(2, "row 1", "row 1")]


def test_a_sample_without_texts_has_none() -> None:
    assert counted({"sample": 1, "latent": 0}, {"sample": 1, "latent": 0}, {"sample": 2, **BOTH}) == [
        (1, "row 0", None),
        (2, "row 2", "row 2"),
    ]


def test_a_removed_sample_is_gone_and_comes_back_in_a_later_generation() -> None:
    removal = {"sample": 1, "removed": 1}
    first, second = {"sample": 1, "latent": 0, "text.t5": 1}, {"sample": 1, "latent": 2, "text.t5": 2}
    assert counted(first, removal) == []
    assert counted(removal, first, {"sample": 2, **BOTH}) == [(2, "row 2", "row 2")]
    assert counted(second, removal, first) == [(1, "row 0", "row 0")]


def test_a_sliced_column_of_identities_gives_its_own_numbers() -> None:
    names = pa.array([f"{number:032x}" for number in range(5)])
    numbers = sample_numbers(pa.chunked_array([names.slice(1, 2), names.slice(4)]))
    assert numbers.tolist() == [[0, 1], [0, 2], [0, 4]]


@pytest.mark.parametrize("name", ["", "x" * 32, "0" * 31, "../../../etc/passwd"])
def test_an_identity_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="not 32 hex digits"):
        sample_numbers(pa.chunked_array([pa.array(["0" * 32, name])]))


def test_resolving_agrees_with_the_rule_applied_row_by_row() -> None:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(3000):
        row: dict[str, int] = {"sample": int(random.integers(200))}
        kind = random.integers(10)
        if kind == 0:
            row["removed"] = int(random.integers(3))
        elif kind < 4:
            row["text.t5"] = int(random.integers(4))
        else:
            row |= {"latent": int(random.integers(4)), "text.t5": int(random.integers(4))}
        rows.append(row)
    expected = {}
    for sample in {row["sample"] for row in rows}:
        removed = max((row.get("removed", -1) for row in rows if row["sample"] == sample), default=-1)
        found = {}
        for stream in ("latent", "text.t5"):
            candidates = [
                (-row[stream], number)
                for number, row in enumerate(rows)
                if row["sample"] == sample and row.get(stream, -1) > removed
            ]
            found[stream] = f"row {min(candidates)[1]}" if candidates else None
        if found["latent"]:
            expected[sample] = (found["latent"], found["text.t5"])
    assert {sample: (latent, text) for sample, latent, text in counted(*rows)} == expected


def test_a_million_rows_resolve_in_moments() -> None:
    number = 1_000_000
    identities = np.random.default_rng(0).bytes(16 * number).hex()
    samples = pa.array([identities[i : i + 32] for i in range(0, 32 * number, 32)])
    generation = pa.StructArray.from_arrays([pa.array(np.zeros(number, np.int32))], ["generation"])
    rows = pa.table({"sample": samples, "latent": generation, "text.t5": generation})
    started = time.perf_counter()
    assert resolve(rows).num_rows == number
    assert time.perf_counter() - started < 30
