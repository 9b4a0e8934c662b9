"""The names of a manifest's columns: what users call ours, and which are left out. Pure."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shared.errors import InputError

REQUIRED_COLUMNS = ("path", "text")
OURS = (*REQUIRED_COLUMNS, "start", "end", "range")
"""start and end of the part of a clip that is meant, or range: both as a pair, or a list of such pairs."""
PROBED_COLUMNS = ("num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
"""Open-Sora's further columns: known, and found out anew by probing."""


def parse_mapping(texts: Sequence[str]) -> dict[str, str]:
    """Returns what a manifest calls our columns, from texts such as ``video=path``: its name -> ours.

    Raises:
        InputError: if a text has another form, or the mapping is not one.
    """
    mapping: dict[str, str] = {}
    for text in texts:
        theirs, _, ours = text.rpartition("=")
        if not theirs:
            raise InputError(f"--columns {text}: expected THEIRS=OURS with OURS one of {', '.join(OURS)}")
        if theirs in mapping:
            raise InputError(f"--columns: {theirs} is given twice: a column is one of ours at most")
        mapping[theirs] = ours
    check_mapping(mapping)
    return mapping


def check_mapping(mapping: Mapping[str, str]) -> None:
    """Sees that each of ours is one column; only text may be several: several captions of one clip.

    Raises:
        InputError: if it is not so.
    """
    for theirs, ours in mapping.items():
        if ours not in OURS:
            raise InputError(f"--columns {theirs}={ours}: expected THEIRS=OURS with OURS one of {', '.join(OURS)}")
    for ours in OURS:
        names = [theirs for theirs, known in mapping.items() if known == ours]
        if len(names) > 1 and ours != "text":
            raise InputError(f"--columns: {' and '.join(names)} are both to be {ours}: expected one of them")
    if "range" in mapping.values() and {"start", "end"} & set(mapping.values()):
        raise InputError("--columns: range with start or end: expected one of the two ways")


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """Which of a manifest's columns is what."""

    path: str
    texts: tuple[str, ...]
    start: str
    end: str
    range: str
    mapped: tuple[str, ...]
    """What the user named, so that it has to be there."""
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, mapping: Mapping[str, str], ignore: Collection[str]) -> "Roles":
        """Returns the roles by a mapping (theirs -> ours); what is not mapped has our name.

        Raises:
            InputError: if the mapping is not one.
        """
        check_mapping(mapping)
        theirs = {ours: name for name, ours in mapping.items()}
        return cls(
            path=theirs.get("path", "path"),
            texts=tuple(name for name, ours in mapping.items() if ours == "text") or ("text",),
            start=theirs.get("start", "start"),
            end=theirs.get("end", "end"),
            range=theirs.get("range", "range"),
            mapped=tuple(mapping),
            ignored=tuple(ignore),
        )

    @property
    def ours(self) -> tuple[str, ...]:
        """The manifest's names of our columns."""
        return (self.path, *self.texts, self.start, self.end, self.range)

    def is_read(self, name: str) -> bool:
        """Returns whether a column is wanted: ours, or another one that is neither ignored nor found by probing."""
        return name in self.ours or name not in (*PROBED_COLUMNS, *self.ignored)

    def others(self, names: Collection[str]) -> list[str]:
        """Returns those of the columns that are wanted and not ours."""
        return [name for name in names if self.is_read(name) and name not in self.ours]

    def check(self, manifest: str, names: Sequence[str]) -> None:
        """Sees that a manifest has the columns that it needs, each once.

        Raises:
            InputError: if it has not.
        """
        found = ", ".join(names[:50]) or "none"
        if doubled := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"manifest {manifest}: two columns are called {doubled[0]!r}: name each column once")
        for column in (*self.mapped, *self.ignored):
            if column not in names:
                raise InputError(f"manifest {manifest}: no column {column!r}: found {found}")
        for ours, theirs in (("path", self.path), *(("text", name) for name in self.texts)):
            if theirs not in names:
                advice = f"name it by --columns NAME={ours}"
                if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
                    advice = f"its header has {mark!r} where a CSV has commas: write it with commas"
                raise InputError(f"manifest {manifest}: no column {ours!r}: found {found}: {advice}")
