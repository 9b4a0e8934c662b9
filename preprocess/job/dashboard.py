"""The job's metrics for Ray's dashboard and Prometheus."""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from preprocess.events import Committed, Event, Heartbeat, Refused, Retried, WorkerLost
from preprocess.metrics import (
    COMMITTED,
    COMMITTED_BYTES,
    METRICS,
    REFUSED,
    RETRIES,
    WORKERS_LOST,
    Metric,
    gauges,
)


class Dashboard:
    """Registers the metrics and keeps them up to date with what happens."""

    def __init__(self) -> None:
        kinds = {"gauge": Gauge, "counter": Counter}
        self._metrics = {
            metric.name: kinds[metric.kind](metric.name, description=metric.description, tag_keys=metric.tag_keys)
            for metric in METRICS
        }

    def note(self, event: Event) -> None:
        """Takes note of an event."""
        if isinstance(event, Heartbeat):
            for metric, value, tags in gauges(event):
                self._metrics[metric.name].set(value, tags=tags)
        elif isinstance(event, Committed):
            self._count(COMMITTED, event.num_members)
            self._count(COMMITTED_BYTES, event.num_bytes)
        elif isinstance(event, Refused):
            for reason, count in event.reasons.items():
                self._count(REFUSED, count, {"reason": reason})
        elif isinstance(event, Retried):
            self._count(RETRIES, 1)
        elif isinstance(event, WorkerLost):
            self._count(WORKERS_LOST, 1)

    def _count(self, metric: Metric, number: int, tags: Mapping[str, str] | None = None) -> None:
        if number:
            self._metrics[metric.name].inc(number, tags=dict(tags or {}))
