"""Where a job is: a bar for people, heartbeats for machines.

On a terminal the bar is redrawn in place; elsewhere, in a job's log, it is a line every ten seconds.
"""

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from preprocess.events import Heartbeat
from preprocess.run_folder import RunFolder
from preprocess.timeline import Timeline

HEARTBEAT_SECONDS = 10.0
RATE_SECONDS = 60.0
_REDRAW_SECONDS = 0.2
_SAMPLE_SECONDS = 1.0
"""How often the counts are kept that the rate is made of."""


class Rate:
    """What was done a second, over the last minute.

    Args:
        now: Seconds, by the clock of all calls.
    """

    def __init__(self, now: float) -> None:
        self._counts: deque[tuple[float, int]] = deque([(now, 0)])

    def note(self, now: float, num_done: int) -> None:
        """Takes note of how many are done; fewer than before is allowed: a lost shard's are done no more."""
        if now - self._counts[-1][0] >= _SAMPLE_SECONDS:
            self._counts.append((now, num_done))
        while len(self._counts) > 2 and self._counts[1][0] <= now - RATE_SECONDS:
            self._counts.popleft()

    def per_second(self, now: float, num_done: int) -> float:
        """Returns the rate."""
        then, before = self._counts[0]
        return max(num_done - before, 0) / (now - then) if now > then else 0.0


class Phase:
    """One phase of a job that counts something; see :meth:`Progress.phase`."""

    def __init__(self, progress: "Progress", what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.num_done = 0
        self._progress = progress
        self.begun = progress.clock()
        self.rate = Rate(self.begun)

    def add(self, count: int) -> None:
        """Counts what is done; less than 0 if it was lost again."""
        self.num_done += count
        self._progress.tick()


class Progress:
    """Draws the bar and logs heartbeats. :meth:`tick` it in the driver's loop, at least every second.

    Args:
        run: Gets the heartbeats; None before there is a cache.
        timeline: Of the workers, for how long encoders were busy and waited for data.
        stream: For people.
        clock: Gives seconds since the epoch.
    """

    def __init__(
        self,
        timeline: Timeline,
        *,
        run: RunFolder | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run = run
        self.beat: Callable[[Heartbeat], None] | None = None
        """Gets the heartbeats in place of the run."""
        self.clock = clock
        self.seconds: dict[str, float] = {}
        """By phase that is over, how long it took."""
        self._timeline = timeline
        self._stream = sys.stderr if stream is None else stream
        self._is_watched = self._stream.isatty()
        self._phase: Phase | None = None
        self._next_draw = self._next_beat = clock()
        self._drawn = 0
        """Characters of the line on the terminal."""

    @contextmanager
    def phase(self, what: str, total: int, unit: str) -> Iterator[Phase]:
        """Opens a phase, such as probing or encoding, for a block; one after another. Nothing is drawn if there is
        nothing to do.

        Args:
            what: Its name.
            total: How many units there are.
            unit: What is counted, in the singular.
        """
        phase = Phase(self, what, total, unit)
        self._phase = phase
        self._next_draw = self.clock() + (0 if self._is_watched else HEARTBEAT_SECONDS)
        self._next_beat = self.clock() + HEARTBEAT_SECONDS
        try:
            yield phase
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + self.clock() - phase.begun
            if total:
                self._draw(phase)
                if self._is_watched:
                    self._stream.write("\n")
            self._drawn, self._phase = 0, None

    def tick(self) -> None:
        """Does what is due: redraws, logs a heartbeat, writes a part of the events."""
        now = self.clock()
        if self.run is not None:
            self.run.tick()
        if self._phase is None:
            return
        self._phase.rate.note(now, self._phase.num_done)
        if now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_SECONDS
            if self.beat is not None:
                self.beat(self.heartbeat())
            elif self.run is not None:
                self.run.log(self.heartbeat())
        if now >= self._next_draw and self._phase.total:
            self._next_draw = now + (_REDRAW_SECONDS if self._is_watched else HEARTBEAT_SECONDS)
            self._draw(self._phase)

    def heartbeat(self) -> Heartbeat:
        """Returns where the job is, within a phase."""
        phase, now = self._phase, self.clock()
        assert phase is not None
        rate = phase.rate.per_second(now, phase.num_done)
        busy, wait = self._timeline.recent(now)
        return Heartbeat(
            phase=phase.what,
            num_done=phase.num_done,
            num_total=phase.total,
            unit=phase.unit,
            per_second=rate,
            gpu_busy=busy,
            data_wait=wait,
            eta_seconds=(phase.total - phase.num_done) / rate if rate else None,
            num_workers=self._timeline.num_alive,
        )

    def _draw(self, phase: Phase) -> None:
        line = bar_line(self.heartbeat(), self.clock() - phase.begun)
        if self._is_watched:
            line = line[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + line.ljust(self._drawn))
            self._drawn = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def bar_line(beat: Heartbeat, elapsed_seconds: float) -> str:
    """Returns the bar: ``encoding  41%|###     | 410/1000 [00:41<00:59, 10.0 clips/s, encoders 97%, data wait 1%]``.

    Args:
        beat: Where the job is.
        elapsed_seconds: Since the phase began.
    """
    left = "?" if beat.eta_seconds is None else tqdm.format_interval(beat.eta_seconds)
    facts = [f"{tqdm.format_interval(elapsed_seconds)}<{left}", f"{beat.per_second:.1f} {beat.unit}s/s"]
    if beat.gpu_busy is not None and beat.data_wait is not None:
        facts += [f"encoders {beat.gpu_busy:.0%}", f"data wait {beat.data_wait:.0%}"]
    bar = tqdm.format_meter(
        beat.num_done,
        beat.num_total,
        elapsed_seconds,
        prefix=f"{beat.phase:<8}",
        bar_format="{desc} {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} ",
        ascii=" #",
    )
    return f"{bar}[{', '.join(facts)}]"
