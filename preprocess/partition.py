"""A part of a manifest, for jobs that share a cache and no Ray cluster, such as those of a Slurm job array. Pure."""

import hashlib
import re
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from shared.errors import InputError
from shared.media.manifest import Manifest

_TEXT = re.compile(r"([0-9]+)/([0-9]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """One of several equal parts of the clips. A clip's part depends on its source alone, so that parts planned at
    different times never hold the same clip."""

    number: int
    """From 1."""
    count: int

    @classmethod
    def parse(cls, text: str) -> "Partition":
        """Returns what ``3/16`` says.

        Raises:
            InputError: if it is not a part of so many.
        """
        match = _TEXT.fullmatch(text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--partition {text}: expected I/N with I from 1 to N, e.g. 3/16")
        return cls(number=int(match[1]), count=int(match[2]))

    def of(self, manifest: Manifest) -> Manifest:
        """Returns a manifest's clips that are in this part; rows that were refused are in the first."""
        sources = (source.as_py() for chunk in manifest.table["source"].chunks for source in chunk)
        parts = (_hash(source) % self.count + 1 == self.number for source in sources)
        table = manifest.table.filter(pa.array(np.fromiter(parts, bool, manifest.table.num_rows)))
        refused = manifest.refused if self.number == 1 else ()
        return replace(manifest, table=table, refused=refused, num_rows=table.num_rows + len(refused))


def _hash(source: str) -> int:
    """Returns a number that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "little")
