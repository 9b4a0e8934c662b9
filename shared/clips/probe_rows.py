"""The rows of all parts of a store of probes, and finding clips among them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.clips.probe_parts import ProbeParts, clip_keys, place_keys, schema_of
from shared.fingerprints import Lookup, Numbers
from shared.windows import Integers

_KEY = ["source", "start", "end", "url", "offset", "size"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRows:
    """Rows of all parts. Build it with :meth:`load`."""

    by_place: Lookup
    """Finds clips where they lie."""
    by_name: Lookup | None
    """Finds clips by their names and times alone."""
    order: Integers | None
    """From what these find to rows of ``facts``; None if they are the same."""
    facts: pa.Table

    @classmethod
    def load(cls, parts: ProbeParts, names: Sequence[str], *, among: Lookup | None = None) -> "ProbeRows":
        """Reads some columns of all parts.

        Args:
            parts: The parts.
            names: Of the columns, ``facts`` has them.
            among: If only clips of these keys (see ``clip_keys``) are wanted; they can be found by their names then.

        Raises:
            InputError: if a part cannot be read.
        """

        def load(table: pa.Table) -> tuple[Numbers, Numbers, npt.NDArray[np.int64], pa.Table]:
            clips = np.empty(0, np.uint64)
            if among is not None:
                clips = clip_keys(table)
                is_wanted = among.find(clips) >= 0
                table, clips = table.filter(pa.array(is_wanted)), clips[is_wanted]
            return place_keys(table), clips, table["sequence"].to_numpy(), table.select(names)

        found = parts.read([*_KEY, *names, "sequence"], load)
        keys = np.concatenate([np.empty(0, np.uint64), *(part[0] for part in found)])
        clips = np.concatenate([np.empty(0, np.uint64), *(part[1] for part in found)])
        sequence = np.concatenate([np.empty(0, np.int64), *(part[2] for part in found)])
        facts = pa.concat_tables([schema_of(names).empty_table(), *(part[3] for part in found)]).combine_chunks()
        order = None
        if (sequence[1:] < sequence[:-1]).any():
            order = np.argsort(sequence, kind="stable")
            keys, clips = keys[order], clips if among is None else clips[order]
        return cls(by_place=Lookup(keys), by_name=None if among is None else Lookup(clips), order=order, facts=facts)

    def find(self, keys: Numbers) -> Integers:
        """Returns the rows (N,) of ``facts`` of clips where they lie (see ``place_keys``), -1 if there is none."""
        return self._rows(self.by_place.find(keys))

    def find_by_name(self, keys: Numbers) -> Integers:
        """Returns the rows (N,) of ``facts`` of clips wherever they lay (see ``clip_keys``), -1 if there is none."""
        assert self.by_name is not None
        return self._rows(self.by_name.find(keys))

    def is_refused(self, reasons: Collection[str] | None = None) -> npt.NDArray[np.bool_]:
        """Returns which rows (N + 1,) are of clips that cannot be used, for some of these reasons if given; the last
        entry, False, is for clips that are not there.
        """
        column = self.facts["reason"]
        found = column.is_valid() if reasons is None else pc.is_in(column, pa.array(list(reasons), pa.string()))
        return np.append(found.to_numpy(), False).astype(bool)

    def _rows(self, found: Integers) -> Integers:
        return found if self.order is None else np.where(found < 0, -1, np.append(self.order, -1)[found])
