"""What a job did, for people: the closing table, and by which rule it ends well."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import median
from typing import TYPE_CHECKING

from shared.errors import InputError
from shared.redaction import without_credentials

if TYPE_CHECKING:  # The options import this file, and --help answers at once.
    from preprocess.events import FirstSample, NodeExcluded
    from preprocess.tally import Tally
    from preprocess.timeline import WorkerSeconds
    from shared.cache.ledger import Refusal

EARLIER = "refused by an earlier run"
"""Stands for the reasons of refusals that earlier runs wrote down."""
_LIMIT = re.compile(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)%")
_OF_ROWS = frozenset(
    {
        *("no_path", "no_caption", "bad_path", "caption_too_long", "bad_range", "bad_text", "bad_json"),
        *("truncated_tar", "duplicate_member", "sparse_member"),
    }
)
_OF_BUCKETS = frozenset({"too_short", "too_small"})
_MENDABLE = frozenset({"missing", "not_readable", "not_a_file", "empty", "no_caption_left"})
_MOST_CAUSES = 8
_MOST_SHOWN = 160
_CUT = " ... "


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """How much may be refused."""

    number: int | None = None
    """Clips, or None if a part is given."""
    part: Fraction | None = None
    """Of all clips, 0 to 1."""

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """Returns what ``100``, ``1%``, ``0.5%`` or ``0`` says.

        Raises:
            InputError: if it is none of these.
        """
        match = _LIMIT.fullmatch(text)
        if match is None or (match[2] is not None and Fraction(match[2]) > 100):
            raise InputError(
                f"--max-refused {text}: expected a number of clips or a part of them up to 100%, e.g. 100 or 1%"
            )
        return cls(number=int(match[1])) if match[1] is not None else cls(part=Fraction(match[2]) / 100)

    def exceeds(self, num_refused: int, num_total: int) -> bool:
        """Returns whether more is refused than may be.

        Args:
            num_refused: What is refused.
            num_total: Of so many, the refused ones included.
        """
        if self.number is not None:
            return num_refused > self.number
        assert self.part is not None
        return num_refused > self.part * num_total


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReport:
    """The figures of one run, also of one that failed or was told to end: what it had done by then."""

    num_rows: int
    """Rows of the manifest."""
    num_clips: int
    """Distinct clips that they name."""
    tally: "Tally"
    """What was counted while it ran."""
    num_committed_before: int = 0
    """Samples of this manifest that were in the cache already."""
    num_stale: int = 0
    """Samples in the cache whose clips changed, or that the manifest names no more."""
    num_removed: int = 0
    """Of these, those that this run removed."""
    num_probed: int = 0
    """Clips that this run probed."""
    num_lost_workers: int = 0
    excluded: Sequence["NodeExcluded"] = ()
    """Nodes that were kept from work."""
    first_samples: Sequence["FirstSample"] = ()
    """Of each worker that encoded something: how long it took to get there."""
    max_refused: Limit = field(default_factory=lambda: Limit(part=Fraction(1)))
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase, as ``Progress.seconds``: probing, planning, texts, encoding."""
    workers: Mapping[str, "WorkerSeconds"] = field(default_factory=dict)
    """What each did."""
    run_url: str | None = None
    """Its folder."""
    output: str | None = None
    """The cache, once there is one."""

    @property
    def num_refused(self) -> int:
        """Rows, clips and samples, those that earlier runs refused too."""
        return self.tally.refused.total()

    @property
    def num_pending(self) -> int:
        """Samples and texts that a later run is to encode."""
        return self.tally.pending.total()

    @property
    def num_present(self) -> int:
        """Samples of the manifest that are in the cache."""
        return self.tally.num_encoded + self.tally.num_by_others + self.num_committed_before

    @property
    def exceeds_limit(self) -> bool:
        """Whether more is refused than ``--max-refused`` allows."""
        return self.max_refused.exceeds(self.num_refused, self.num_refused + self.num_pending + self.num_present)

    @property
    def exit_code(self) -> int:
        """0 if all is done; 1 if too much is refused, or all; 3 if work is left for a later run."""
        if self.exceeds_limit:
            return 1
        if self.num_pending:
            return 3
        return 1 if (self.num_rows or self.num_refused) and not self.num_present else 0

    @property
    def samples_per_second(self) -> float | None:
        """Samples encoded a second of the phase of encoding."""
        seconds = self.seconds.get("encoding", 0.0)
        return self.tally.num_encoded / seconds if seconds and self.tally.num_encoded else None

    @property
    def all_workers(self) -> "WorkerSeconds | None":
        """What they did together."""
        first, *others = self.workers.values() or (None,)
        if first is not None:
            for other in others:
                assert other is not None
                first += other
        return first

    @property
    def encoder_rate(self) -> float | None:
        """Samples a second of a worker while its encoders are at work: what it would reach if it never waited."""
        workers = self.all_workers
        busy = workers.text + workers.vae if workers else 0.0
        return self.tally.num_encoded / busy if busy and self.tally.num_encoded else None

    def table(self) -> str:
        """Returns the closing table."""
        rows = [row for row in self._rows() if row[1]]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value:>14}" for name, value in rows]
        if self.tally.examples:
            lines += ["", "refused, one of each:"]
        for reason, refusal in sorted(self.tally.examples.items()):
            lines += [f"  {reason}: {shown(refusal)}", f"    {remedy(refusal)}"]
        if self.tally.pending_examples:
            lines += ["", "pending, one of each, for the same command to go on with:"]
        for reason, example in sorted(self.tally.pending_examples.items()):
            lines += [f"  {_cut(reason)}: {_cut(without_credentials(example))}"]
        if self.excluded:
            lines += ["", "nodes kept from work:"]
        lines += [f"  {_cut(f'{node.node}: {node.cause}')}" for node in self.excluded]
        lines += self._places()
        return "\n".join(lines)

    def _places(self) -> list[str]:
        """Returns where more is to be found."""
        if self.output is None or self.run_url is None:
            return []
        lines = ["", f"events, figures and timeline: {without_credentials(self.run_url)}"]
        if self.num_refused:
            place = shlex.quote(without_credentials(self.output))
            lines += [f"all that is refused: python -m shared.cache refused {place}"]
        return lines

    def _rows(self) -> Iterator[tuple[str, str]]:
        """Yields names and values; a value of nothing is not shown."""
        tally, workers = self.tally, self.all_workers
        yield "manifest rows", f"{self.num_rows:,}"
        yield "clips", f"{self.num_clips:,}"
        yield "samples encoded", f"{tally.num_encoded:,}"
        yield "  by another job", _count(tally.num_by_others)
        yield "samples already there", f"{self.num_committed_before:,}"
        yield "  with new texts", _count(tally.num_new_texts)
        yield "shared texts encoded", _count(tally.num_shared_texts)
        yield "samples removed", _count(self.num_removed)
        yield "pending, for a later run", _count(self.num_pending)
        yield from _causes(tally.pending.most_common())
        yield "refused", f"{self.num_refused:,}"
        yield from ((f"  {reason}", f"{count:,}") for reason, count in tally.refused.most_common())
        yield "shards handed out again", _count(tally.num_retries)
        yield "workers lost", _count(self.num_lost_workers)
        yield "nodes kept from work", _count(len(self.excluded))
        yield "bytes written", f"{tally.num_bytes:,}"
        for phase, seconds in self.seconds.items():
            yield f"seconds {phase}", f"{seconds:,.1f}"
        if firsts := [first.seconds for first in self.first_samples]:
            yield "seconds to a worker's first sample", f"{median(firsts):,.1f}"
            yield "  at most", f"{max(firsts):,.1f}"
        yield "probes/s", _rate(self.num_probed, self.seconds.get("probing"))
        yield "samples/s", "-" if self.samples_per_second is None else f"{self.samples_per_second:,.2f}"
        yield "  of a worker's encoders", "" if self.encoder_rate is None else f"{self.encoder_rate:,.2f}"
        yield "tokens/s of T5", _rate(tally.num_tokens, workers.text if workers else None)
        if workers is not None and workers.busy is not None and workers.data_wait is not None:
            yield "encoders busy", f"{workers.busy:.1%}"
            yield "data wait", f"{workers.data_wait:.1%}"


def remedy(refusal: "Refusal") -> str:
    """Returns what to do about a refused clip."""
    if refusal.reason in _OF_ROWS:
        return "mend the manifest, or the shard: the next run reads it again"
    if refusal.reason in _OF_BUCKETS:
        return "no bucket is small enough: add one by --buckets, or leave it"
    if refusal.reason in _MENDABLE:
        return "mend it: the next run tries it again"
    return f"--retry-refused {refusal.reason} tries it again; a changed file is tried anyway"


def shown(refusal: "Refusal") -> str:
    """Returns which clip or row was refused and what was found, in one short line."""
    return _cut(f"{without_credentials(refusal.source)}: {without_credentials(refusal.detail)}")


def _cut(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= _MOST_SHOWN:
        return line
    half = (_MOST_SHOWN - len(_CUT)) // 2  # names of files come first, what is wrong with them last
    return f"{line[:half]}{_CUT}{line[-half:]}"


def _causes(counted: Sequence[tuple[str, int]]) -> Iterator[tuple[str, str]]:
    for cause, count in counted[:_MOST_CAUSES]:
        yield f"  {cause if len(cause) <= 60 else f'{cause[:57]}...'}", f"{count:,}"
    yield "  for other causes", _count(sum(count for _, count in counted[_MOST_CAUSES:]))


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _rate(number: int, seconds: float | None) -> str:
    return f"{number / seconds:,.0f}" if number and seconds else ""
