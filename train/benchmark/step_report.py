"""Rows of the step benchmarks as Markdown."""

import math
from collections.abc import Sequence

from train.benchmark.parts import PARTS
from train.benchmark.steps import StepRow


def table(rows: Sequence[StepRow]) -> str:
    """Returns the rows, each with its speed-up over the first variant of its setting, the plain one."""
    parts = [part for part in PARTS if any(part in row.parts_ms for row in rows)]
    titles = ["what", "variant", "batch", "kept", "samples/s", "tokens/s", "TFLOP/s", "MFU", "times plain", "GiB"]
    lines = [
        f"| {' | '.join([*titles, 'ms a step', *parts, 'published'])} |",
        "|" + "---|" * (len(titles) + 2 + len(parts)),
    ]
    plain: dict[str, StepRow] = {}
    for row in rows:
        first = plain.setdefault(row.setting, row)
        if row.error:
            lines.append(f"| {row.setting} | {row.variant} | {row.batch} | {row.checkpointing} | {row.error} |")
            continue
        speed_up = row.samples_per_second / first.samples_per_second
        cells = [
            row.setting,
            row.variant,
            str(row.batch),
            {"none": "all", "selective": "products", "full": "inputs"}[row.checkpointing],
            f"{row.samples_per_second:.4g}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.tflops:.0f}",
            f"{row.mfu:.1%}",
            "" if math.isnan(speed_up) else f"{speed_up:.2f}",
            "" if row.peak_memory_gib is None else f"{row.peak_memory_gib:.1f}",
            f"{row.step_ms:.1f}" + (f" (from {row.scaled_from_blocks} blocks)" if row.scaled_from_blocks else ""),
            *(f"{row.parts_ms.get(part, 0):.1f}" for part in parts),
            row.published,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
