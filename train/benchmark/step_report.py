"""Rows of the step benchmarks as Markdown: a table of speeds, and one of where the milliseconds go."""

import math
from collections.abc import Callable, Sequence

from train.benchmark.parts import PARTS
from train.benchmark.steps import StepRow

Cell = Callable[[StepRow], str]


def tables(rows: Sequence[StepRow]) -> str:
    """Returns both tables. Columns that no row fills are left out."""
    return f"{speed_table(rows)}\n\n{time_table(rows)}" if any(row.parts_ms for row in rows) else speed_table(rows)


def speed_table(rows: Sequence[StepRow]) -> str:
    """Returns what each row comes to, beside the first variant of its setting and what was published."""
    first: dict[str, StepRow] = {}
    for row in rows:
        first.setdefault(row.setting, row)
    names = sorted({each.variant for each in first.values()})
    compared = len(rows) > len(first) and len(names) == 1

    def speed_up(row: StepRow) -> str:
        return _number(first[row.setting].step_ms / row.step_ms, ".2f") if compared else ""

    def peak(row: StepRow) -> str:
        return "" if row.peak_memory_gib is None else f"{row.peak_memory_gib:.1f}" + _scaled(row, " ({} blocks)")

    each = " a GPU" if any(row.num_ranks > 1 for row in rows) else ""
    return _table(
        rows,
        {
            "what": lambda row: row.setting,
            "variant": lambda row: row.variant,
            "attention": lambda row: row.attention,
            "batch": lambda row: str(row.batch),
            "computed again": lambda row: "" if row.recomputed == "none" else row.recomputed,
            f"samples/s{each}": lambda row: row.error or _number(row.samples_per_second, ".4g"),
            f"tokens/s{each}": lambda row: _number(row.tokens_per_second, ",.0f"),
            f"TFLOP/s{each}": lambda row: _number(row.tflops, ".0f"),
            "MFU": lambda row: _number(row.mfu, ".1%"),
            f"times {names[0] if names else ''}": speed_up,
            "times one GPU": lambda row: _number(row.times_one_rank, ".2f"),
            "peak GiB": peak,
            "published, H800": lambda row: _number(row.published, ",.0f"),
            "times published": lambda row: _number(row.times_published, ".2f"),
        },
    )


def time_table(rows: Sequence[StepRow]) -> str:
    """Returns the milliseconds of a step, of its parts, and of encoding."""

    def part(name: str) -> Cell:
        return lambda row: _number(row.parts_ms.get(name), ".1f")

    def step(row: StepRow) -> str:
        return _number(row.step_ms, ".1f") + _scaled(row, " ({} blocks, scaled)")

    def over_the_sum(row: StepRow) -> str:
        return "" if row.sum_of_parts_ms is None else _number(row.step_ms / row.sum_of_parts_ms - 1, "+.1%")

    return _table(
        [row for row in rows if not row.error],
        {
            "milliseconds": lambda row: row.setting,
            "variant": lambda row: row.variant,
            "step": step,
            **{name: part(name) for name in PARTS},
            "launching alone": lambda row: _number(row.launching_ms, ".1f"),
            "encoders alone": lambda row: _number(row.encoders_alone_ms, ".1f"),
            "cached step + encoders": lambda row: _number(row.sum_of_parts_ms, ".1f"),
            "step against that": over_the_sum,
        },
    )


def _scaled(row: StepRow, words: str) -> str:
    return "" if row.scaled_from_blocks is None else words.format(row.scaled_from_blocks)


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def _table(rows: Sequence[StepRow], columns: dict[str, Cell]) -> str:
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    filled = {title: column for title, column in cells.items() if any(column)}
    lines = [filled.keys(), ["---"] * len(filled), *zip(*filled.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
