"""Worker processes that fill one rank's batches ahead of the trainer."""

import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context, reduction
from typing import Any, Protocol

import torch

from shared.errors import InputError
from train.batch_memory import BatchBuffer, BufferPool
from train.data import Batch
from train.out_of_memory import which_memory_ran_out
from train.rank_batches import LoaderJob, Report, SlotFiller, batch_dtypes
from train.step_samples import padded_length
from train.stop import SIGNALS

BATCHES_AHEAD = 3
"""Batches that workers have ready while the trainer is at one."""
_GRACE_SECONDS = 10
_END_SECONDS = 5.0


def load_batches(job: LoaderJob, steps: range, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Yields one rank's batches of ``steps``, in order, read ahead by worker processes.

    Args:
        job: What to read.
        steps: Consecutive.
        num_workers: Processes; more than the rank has samples in a batch are not started. 0: read in this one.
        pin_memory: For copies to a GPU.

    Raises:
        InputError: if a payload is missing or damaged.
    """
    assert steps.step == 1
    if job.copies is not None:
        job.copies.open()
    dtypes = batch_dtypes(job.index.columns(), job.codecs)
    length = padded_length(job.max_tokens, job.max_tokens)
    pool = BufferPool(max(job.shape(b, length, dtypes).num_bytes for b in job.plan.buckets), pin=pin_memory)
    num_workers = min(num_workers, max(job.batch_size(bucket) for bucket in job.plan.buckets))
    try:
        with _inline(job, steps, pool) if num_workers == 0 else _processes(job, steps, pool, num_workers) as source:
            started: deque[tuple[int, int]] = deque()
            upcoming = iter(steps)
            while True:
                while len(started) < source.batches_ahead and (step := next(upcoming, None)) is not None:
                    number = pool.take()
                    source.start(step, number)
                    started.append((step, number))
                if not started:
                    return
                reports = source.finish(*started[0])
                yield _batch(job, dtypes, reports, pool, started.popleft()[1])
    finally:
        pool.close()


def _batch(
    job: LoaderJob, dtypes: tuple[torch.dtype, torch.dtype], reports: Sequence[Report], pool: BufferPool, number: int
) -> Batch:
    shape = job.shape(reports[0].bucket, reports[0].caption_length, dtypes)
    tensors = shape.tensors(pool.lease(number))
    captions, mask = tensors.captions, tensors.mask
    too_long = {place: caption for report in reports for place, caption in report.too_long.items()}
    if too_long:
        longest = padded_length(max(map(len, too_long.values())), job.max_tokens)
        captions = torch.nn.functional.pad(captions, (0, 0, 0, longest - captions.shape[1]))
        mask = torch.nn.functional.pad(mask, (0, longest - mask.shape[1]))
        for place, caption in too_long.items():
            captions[place], mask[place] = 0, 0
            captions[place, : len(caption)] = torch.from_numpy(caption).view(dtypes[1])
            mask[place, : len(caption)] = 1
    return Batch(
        latents=tensors.latents,
        u=tensors.u,
        noise_keys=tensors.noise_keys,
        captions=captions[:, None],
        mask=mask,
        drop_caption=tensors.drop_caption,
        fps=tensors.fps,
        height=torch.full_like(tensors.fps, reports[0].bucket.height),
        width=torch.full_like(tensors.fps, reports[0].bucket.width),
        identity=tensors.identity,
        moments=job.moments,
        num_skipped=sum(report.skipped for report in reports),
    )


class _Source(Protocol):
    """What fills buffers."""

    batches_ahead: int

    def start(self, step: int, number: int) -> None:
        """Begins to fill a buffer with a step's batch."""

    def finish(self, step: int, number: int) -> Sequence[Report]:
        """Waits until the oldest of the begun is filled."""


class _Inline:
    """Fills in this process, when the batch is asked for."""

    batches_ahead = 1

    def __init__(self, filler: SlotFiller, pool: BufferPool) -> None:
        self._filler, self._pool = filler, pool

    def start(self, step: int, number: int) -> None:
        pass

    def finish(self, step: int, number: int) -> Sequence[Report]:
        return [self._filler.fill(step, self._pool.buffers[number].array())]


@contextmanager
def _inline(job: LoaderJob, steps: range, pool: BufferPool) -> Iterator[_Source]:
    filler = SlotFiller(job, steps)
    try:
        yield _Inline(filler, pool)
    finally:
        filler.close()


class _Processes:
    """Workers, each with a share of the slots, which fill the same buffers at different places."""

    batches_ahead = BATCHES_AHEAD

    def __init__(self, links: list[connection.Connection], processes: list[Any], pool: BufferPool) -> None:
        self._links, self._processes, self._pool = links, processes, pool
        self._known_buffers = 0

    def start(self, step: int, number: int) -> None:
        for link, process in zip(self._links, self._processes, strict=True):
            try:
                for buffer in self._pool.buffers[self._known_buffers :]:
                    link.send(("buffer", os.fstat(buffer.descriptor).st_size))
                    reduction.send_handle(link, buffer.descriptor, process.pid)
                link.send(("fill", step, number))
            except OSError:
                raise self._died(process) from None
        self._known_buffers = len(self._pool.buffers)

    def finish(self, step: int, number: int) -> Sequence[Report]:
        reports = []
        for link, process in zip(self._links, self._processes, strict=True):
            try:
                answer = link.recv()
            except (EOFError, OSError):
                raise self._died(process) from None
            if isinstance(answer, Exception):
                raise answer
            reports.append(answer)
        return reports

    def _died(self, process: Any) -> Exception:
        process.join(_END_SECONDS)
        if process.exitcode == -signal.SIGKILL:
            return InputError(
                "a loader process was killed (signal 9), as Linux does where the host runs out of memory: use fewer "
                "--num-workers, or a smaller --batch-size"
            )
        return RuntimeError(f"a loader process ended with code {process.exitcode}")


@contextmanager
def _processes(job: LoaderJob, steps: range, pool: BufferPool, num_workers: int) -> Iterator[_Source]:
    context = get_context("forkserver")  # clients of object stores, and CUDA, do not survive a fork
    context.set_forkserver_preload(["train.loader"])
    told = dict(os.environ), pickle.dumps(job), steps
    links, processes = [], []
    try:
        for part in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, *told, part, num_workers), daemon=True)
            process.start()
            theirs.close()
            links.append(ours)
            processes.append(process)
        yield _Processes(links, processes, pool)
    finally:
        for link in links:
            link.close()
        for process in processes:
            process.join(_END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _work(
    link: connection.Connection, environment: dict[str, str], job: bytes, steps: range, part: int, num_parts: int
) -> None:
    """Fills what it is told to until the other end of the link is closed."""
    os.environ.update(environment)  # the server that forks workers may be older than what a store needs of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _outlive_signals()
    torch.set_num_threads(1)
    filler = SlotFiller(pickle.loads(job), steps, part=part, num_parts=num_parts)
    buffers: list[BatchBuffer] = []
    try:
        while True:
            match link.recv():
                case ("buffer", num_bytes):
                    buffers.append(BatchBuffer(reduction.recv_handle(link), num_bytes))
                case ("fill", step, number):
                    try:
                        answer: Report | Exception = filler.fill(step, buffers[number].array())
                    except InputError as error:
                        answer = InputError(str(error))
                    except Exception as error:  # as its text: not every error comes out of a pickle as it went in
                        told = f"a loader process failed: {type(error).__name__}: {error}"
                        if which_memory_ran_out(error) == "host":
                            answer = MemoryError(told)
                        else:
                            traceback.print_exc()
                            answer = RuntimeError(told)
                    link.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        filler.close()
        os._exit(0)  # a request that is under way must not hold up the end


def _outlive_signals() -> None:
    """Lets this process survive a signal to stop for long enough that the trainer gets the batch that it waits for.

    A scheduler sends the signal to every process of a job. The trainer then asks for no further batch.
    """
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    for number in SIGNALS:
        signal.signal(number, lambda *_: signal.alarm(_GRACE_SECONDS))
