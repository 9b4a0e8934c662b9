"""All that is seen of a job while it runs: the bar, the events of the run folder, the timeline of the workers."""

import signal
import time
from collections.abc import Callable
from types import FrameType

from preprocess.events import Event, FirstSample, NodeExcluded, WorkerLost, WorkerStarted
from preprocess.progress import Progress
from preprocess.run_folder import RunFolder
from preprocess.timeline import Timeline


class Watch:
    """What the driver tells as it goes. Events from before there is a cache are kept until there is one.

    Args:
        note: Gets all events, for a dashboard.
    """

    def __init__(self, note: Callable[[Event], None]) -> None:
        self._note = note
        self.timeline = Timeline(time.time())
        self.progress = Progress(self.timeline)
        self.progress.beat = self.log
        self.told_to_end = False
        """SIGTERM came: nothing more is begun."""
        self.told_at = 0.0
        """When, by the monotonic clock."""
        self.num_lost = 0
        """Workers."""
        self.first_samples: list[FirstSample] = []
        """Of each worker that got so far."""
        self.excluded: list[NodeExcluded] = []
        self._early: list[Event] = []

    def listen(self) -> None:
        """Takes SIGTERM for the wish to end in order."""

        def note(number: int, frame: FrameType | None) -> None:
            self.told_to_end, self.told_at = True, time.monotonic()

        signal.signal(signal.SIGTERM, note)

    def pause(self, seconds: float) -> None:
        """Waits, but not longer than until the job is told to end."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.told_to_end:
            time.sleep(0.2)
            self.progress.tick()

    def attach(self, run: RunFolder) -> None:
        """Opens the log."""
        self.progress.run = run
        for event in self._early:
            run.log(event)
        self._early.clear()

    def log(self, event: Event) -> None:
        """Writes an event down."""
        self._note(event)
        if self.progress.run is None:
            self._early.append(event)
        else:
            self.progress.run.log(event)

    def started(self, worker: str, node: str, load_seconds: float) -> None:
        """Takes note of a worker that has loaded its encoders."""
        self.timeline.started(worker, time.time())
        self.log(WorkerStarted(worker=worker, node=node, load_seconds=load_seconds))

    def encoded(self, first: FirstSample) -> None:
        """Takes note of a worker's first sample."""
        self.first_samples.append(first)
        self.log(first)

    def exclude(self, node: str, cause: str) -> None:
        """Takes note of a node that gets no more work."""
        self.excluded.append(NodeExcluded(node=node, cause=cause))
        self.log(self.excluded[-1])

    def lost(self, worker: str, node: str, cause: str) -> None:
        """Takes note of a worker that is gone."""
        self.num_lost += 1
        self.timeline.ended(worker, time.time())
        self.log(WorkerLost(worker=worker, node=node, cause=cause))
