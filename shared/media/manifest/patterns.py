"""Which shards a pattern names: ``shards/{000..099}.tar``, ``shards/*.tar``, or one tar."""

import glob
import os
import re
from collections.abc import Sequence
from itertools import product
from math import prod

from shared.errors import InputError
from shared.media.remote import list_objects
from shared.media.urls import parent_of, scheme_of

MAX_SHARDS = 1_000_000
_WILD = re.compile(r"[*?\[]")


def root_of_pattern(url: str) -> str:
    """Returns the folder or URL in which all that a pattern names lies."""
    if os.path.isfile(url):
        return parent_of(url)
    return parent_of(re.split(r"[{*?\[]", url, maxsplit=1)[0] + "x")


def find_shards(url: str, shown: str) -> list[str]:
    """Returns the shards that a pattern names: those of braces in their order, those of wildcards sorted.

    Raises:
        InputError: if a file of this machine is not there, or wildcards find nothing.
        MediaError: if an object store cannot be listed.
    """
    if os.path.isfile(url):
        return [url]
    found = [shard for name in expand_braces(url) for shard in (_glob(name) if _is_wild(name) else [name])]
    if not found:
        raise InputError(f"manifest {shown}: no such file: expected shards/{{000..099}}.tar or shards/*.tar")
    for shard in found:
        if scheme_of(shard) is None and not os.path.isfile(shard):
            raise InputError(f"manifest {shown}: no such file {shard}")
    return list(dict.fromkeys(found))


def expand_braces(pattern: str) -> list[str]:
    """Returns what a pattern with ``{000..099}`` and ``{a,b}`` names; the last braces change fastest.

    Raises:
        InputError: if braces have another form, or name more than a million.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any(brace in literal for literal in parts[::2] for brace in "{}"):
        raise InputError(f"manifest {pattern}: its braces are not balanced: expected e.g. {{000..099}}.tar")
    choices: list[Sequence[str] | range] = []
    widths: list[int] = []
    for inside in parts[1::2]:
        bounds = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside, re.ASCII)
        if bounds is None and "," not in inside:
            raise InputError(f"manifest {pattern}: braces {{{inside}}}: expected e.g. {{000..099}} or {{a,b}}")
        choices.append(range(int(bounds[1]), int(bounds[2]) + 1) if bounds else inside.split(","))
        widths.append(len(bounds[1]) if bounds else 0)
    if prod(map(len, choices)) > MAX_SHARDS:
        raise InputError(f"manifest {pattern}: more than {MAX_SHARDS:,} shards: use wildcards")
    return [
        parts[0]
        + "".join(
            f"{choice:0>{width}}{literal}" for choice, width, literal in zip(chosen, widths, parts[2::2], strict=True)
        )
        for chosen in product(*choices)
    ]


def _is_wild(url: str) -> bool:
    return bool(_WILD.search(url)) and not url.startswith("http")


def _glob(url: str) -> list[str]:
    if scheme_of(url) is None:
        return sorted(path for path in glob.glob(url, recursive=True) if os.path.isfile(path))
    pattern = re.compile(glob.translate(url, recursive=True) if hasattr(glob, "translate") else _translate(url))
    return [found for found, _ in list_objects(root_of_pattern(url)) if pattern.fullmatch(found)]


def _translate(url: str) -> str:
    parts = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(parts.get(part) or re.escape(part) for part in re.split(r"(\*\*|\*|\?)", url))
