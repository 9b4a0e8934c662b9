"""What the dashboard shows of a job: names, kinds and tags of its metrics. Plain data, which the driver registers."""

from dataclasses import dataclass
from typing import Literal

from preprocess.events import Heartbeat

PHASE = "phase"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric, as Ray and Prometheus know it."""

    name: str
    kind: Literal["gauge", "counter"]
    description: str
    tag_keys: tuple[str, ...] = ()


CLIPS_PER_SECOND = Metric(
    name="latentmill_per_second",
    kind="gauge",
    description="Units done a second, over the last minute",
    tag_keys=(PHASE,),
)
DONE = Metric(name="latentmill_done", kind="gauge", description="Units of the phase that are done", tag_keys=(PHASE,))
TOTAL = Metric(name="latentmill_total", kind="gauge", description="Units of the phase", tag_keys=(PHASE,))
GPU_BUSY = Metric(
    name="latentmill_gpu_busy", kind="gauge", description="Part of the workers' time in which encoders ran, 0 to 1"
)
DATA_WAIT = Metric(
    name="latentmill_data_wait", kind="gauge", description="Part of the workers' time in which they waited for frames"
)
WORKERS = Metric(name="latentmill_workers", kind="gauge", description="Workers that are alive")
COMMITTED = Metric(name="latentmill_samples_committed", kind="counter", description="Samples and texts committed")
COMMITTED_BYTES = Metric(name="latentmill_bytes_committed", kind="counter", description="Bytes of committed shards")
REFUSED = Metric(
    name="latentmill_refused", kind="counter", description="Rows, clips and samples refused", tag_keys=("reason",)
)
RETRIES = Metric(name="latentmill_shards_retried", kind="counter", description="Shards that were handed out again")
WORKERS_LOST = Metric(name="latentmill_workers_lost", kind="counter", description="Workers that were lost")

METRICS = (
    CLIPS_PER_SECOND,
    DONE,
    TOTAL,
    GPU_BUSY,
    DATA_WAIT,
    WORKERS,
    COMMITTED,
    COMMITTED_BYTES,
    REFUSED,
    RETRIES,
    WORKERS_LOST,
)
"""All of them."""


def gauges(beat: Heartbeat) -> list[tuple[Metric, float, dict[str, str]]]:
    """Returns what the gauges show at a heartbeat, with their tags."""
    tags = {PHASE: beat.phase}
    shown: list[tuple[Metric, float, dict[str, str]]] = [
        (CLIPS_PER_SECOND, beat.per_second, tags),
        (DONE, beat.num_done, tags),
        (TOTAL, beat.num_total, tags),
        (WORKERS, beat.num_workers, {}),
    ]
    if beat.gpu_busy is not None and beat.data_wait is not None:
        shown += [(GPU_BUSY, beat.gpu_busy, {}), (DATA_WAIT, beat.data_wait, {})]
    return shown
