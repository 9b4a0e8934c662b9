"""Words of what is said to people."""

from typing import SupportsIndex


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """Returns a number with what it counts: ``1 shard``, ``12,000 shards``, ``2.5 epochs``.

    Args:
        number: A whole one is shown with commas, another one as short as six digits allow.
        noun: Of one. It may have words before it: ``new shard``.
        plural: Of several; by default the noun with an s.
    """
    shown = f"{number:,}" if isinstance(number, SupportsIndex) else f"{number:g}"
    return f"{shown} {noun if number == 1 else plural or f'{noun}s'}"
