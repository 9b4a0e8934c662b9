"""Prices of storage and GPUs, from a TOML file: ``prices.toml`` here, or the user's own in the same form."""

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shared.errors import InputError

DEFAULT_FILE = Path(__file__).with_name("prices.toml")

_NUMBERS = ("gb_bytes", "write_1000", "read_1000", "retrieval_gb", "egress_gb", "minimum_months")


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageClass:
    """What a provider asks for storing and reading, in dollars."""

    name: str
    label: str
    gb_bytes: float
    """Bytes of what the provider calls a GB."""
    gb_month: tuple[tuple[float, float], ...]
    """Steps (up to so many GB, price of a GB and month); the last has no end."""
    write_1000: float
    """Of 1000 puts."""
    read_1000: float
    """Of 1000 gets."""
    retrieval_gb: float
    """Of a GB that is read."""
    egress_gb: float
    """Of a GB that leaves the provider's region."""
    minimum_months: float
    """Billed at least."""
    date: str
    source: str

    def month(self, num_bytes: float) -> float:
        """Returns the price of storing so many bytes for a month."""
        left, start, price = num_bytes / self.gb_bytes, 0.0, 0.0
        for end, gb_month in self.gb_month:
            part = min(left, end - start)
            price, left, start = price + part * gb_month, left - part, end
        return price


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPrice:
    """What an hour of a GPU costs, in dollars."""

    name: str
    hour: float
    date: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """All prices, by name."""

    storage: dict[str, StorageClass]
    gpus: dict[str, GpuPrice]


def read_prices(path: Path) -> Prices:
    """Reads a file of prices.

    Raises:
        InputError: if it is missing, is not TOML, or an entry lacks something or has too much.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"prices {path}: not readable as TOML: {error}") from None
    if not isinstance(document.get("storage"), list) or not document["storage"]:
        raise InputError(f"prices {path}: no [[storage]]: expected at least one, as in {DEFAULT_FILE}")
    storage = [_storage_class(path, entry) for entry in document["storage"]]
    gpus = [GpuPrice(**_checked(path, "gpu", entry, GpuPrice, ("hour",))) for entry in document.get("gpu", [])]
    return Prices(storage={each.name: each for each in storage}, gpus={each.name: each for each in gpus})


def _storage_class(path: Path, entry: Any) -> StorageClass:
    values = _checked(path, "storage", entry, StorageClass, _NUMBERS)
    steps = values["gb_month"]
    if (
        not isinstance(steps, list)
        or not steps
        or not all(isinstance(step, list) and len(step) == 2 and all(map(_is_price, step)) for step in steps)
        or steps[-1][0] != math.inf
        or steps != sorted(steps, key=lambda step: step[0])
    ):
        raise InputError(
            f"prices {path}: storage {values['name']!r}: gb_month = {steps}: expected rising steps "
            "[[up to so many GB, price], ..., [inf, price]]"
        )
    if values["gb_bytes"] <= 0:
        raise InputError(f"prices {path}: storage {values['name']!r}: gb_bytes = 0: expected 1e9 or 2^30")
    return StorageClass(**{**values, "gb_month": tuple(tuple(step) for step in steps)})


def _checked(path: Path, kind: str, entry: Any, form: type, numbers: tuple[str, ...]) -> dict[str, Any]:
    """Returns an entry whose keys are those of ``form`` and whose ``numbers`` are numbers."""
    names = {field.name for field in fields(form)}
    if not isinstance(entry, dict) or set(entry) != names:
        found = ", ".join(sorted(entry)) if isinstance(entry, dict) else repr(entry)
        raise InputError(f"prices {path}: a [[{kind}]] has {found}: expected {', '.join(sorted(names))}")
    for name in numbers:
        if not _is_price(entry[name]):
            raise InputError(f"prices {path}: {kind} {entry['name']!r}: {name} = {entry[name]!r}: expected a number")
    return entry


def _is_price(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
