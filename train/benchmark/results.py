"""Where a benchmark's results go."""

import json
from pathlib import Path
from typing import Any

from shared.errors import InputError


def make_room(output: Path | None) -> None:
    """Makes the folder of a file for results, before minutes are spent on them.

    Args:
        output: The file; None for none.

    Raises:
        InputError: if that cannot be.
    """
    if output is None:
        return
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: give the name of a JSON file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: its folder was not made ({error}): give another") from error


def write_results(output: Path, values: Any, table: str | None = None) -> None:
    """Writes results as JSON, and a table beside them, with .md."""
    output.write_text(json.dumps(values, indent=2) + "\n")
    if table is not None:
        output.with_suffix(".md").write_text(table + "\n")
