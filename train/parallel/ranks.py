"""The ranks of a run: joining them, agreeing, and failing together.

A plain ``python -m train`` is one rank; torchrun, DeepSpeed's launcher or Slurm's srun start several
(:mod:`train.parallel.launchers`). Flags and errors travel over a group of their own on the CPU, so that they do not
wait for the accelerators.

A rank that fails by itself, in the middle of what all do together, does not leave the group in order: that waits for
the others, who wait for this rank. Its process ends at once (:func:`train.ending.end_process`), with that its
connections, and with those the others, or their launcher ends them.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from shared.errors import InputError
from shared.redaction import without_credentials
from train.parallel.allocator import let_segments_grow
from train.parallel.launchers import ranks_from_slurm
from train.parallel.sequence import SequenceParallel, require_degree

Result = TypeVar("Result")


class Ranks:
    """This process among the others. Build it with :func:`join_ranks`."""

    def __init__(self, device: torch.device, control: dist.ProcessGroup | None) -> None:
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.sequence = SequenceParallel(1)
        self._control = control
        self._failed_together = False
        self.ends_alone = False
        """Whether this rank has failed by itself, and leaves the others where they are."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of each batch this rank has: the same for the ranks that share their samples' tokens."""
        return self.sequence.data_rank

    @property
    def num_data_ranks(self) -> int:
        """Into how many parts each batch is divided."""
        return self.sequence.num_data_ranks

    def share_samples(self, degree: int, *, zero_stage: int) -> None:
        """Lets ``degree`` neighbouring ranks share the tokens of the same samples from here on. All ranks call it.

        Args:
            degree: Ranks that share a sample.
            zero_stage: At 3, weights are gathered each time that a layer is called: then it is not called for pieces.

        Raises:
            InputError: if ``degree`` does not divide the ranks.
        """
        if degree != self.sequence.degree:
            self.agree(lambda: require_degree(degree, self.world_size))
            self.sequence = SequenceParallel(degree)
        self.sequence.in_pieces = zero_stage < 3

    def agree(self, work: Callable[[], Result]) -> Result:
        """Returns ``work()`` if it succeeds on every rank.

        Where it does not, rank 0 raises the first rank's :class:`InputError` and prints it, and the others exit after.
        Any other error is raised where it came up; rank 0 says which it was, and all end.
        """
        result, failure, defect = None, None, None
        try:
            result = work()
        except InputError as error:
            failure = error
        except SystemExit:  # of a command line's parser, which all ranks run on the same words
            self._failed_together = True
            raise
        except Exception as error:
            defect = error
        told = None if defect is None else f"rank {self.rank} failed: {type(defect).__name__}: {defect}"
        answers: list[tuple[InputError | None, str | None]] = [(None, None)] * self.world_size
        dist.all_gather_object(answers, (failure, told), group=self._control)
        defects = [told for _, told in answers if told is not None]
        if defects:
            self._end_with(defects[0], defect)
        first = next((error for error, _ in answers if error is not None), None)
        if first is not None:
            self._failed_together = True
            if self.is_first:
                raise first
            raise SystemExit(2)
        return result  # type: ignore[return-value]  # no failure: work() returned

    def _end_with(self, told: str, own: Exception | None) -> NoReturn:
        """Raises this rank's own error, or ends after another's."""
        self.fail_alone()
        if own is not None:
            raise own
        if self.is_first:
            print(f"error: {without_credentials(told)}", file=sys.stderr, flush=True)
        raise SystemExit(1)

    def fail_alone(self) -> None:
        """Takes it that this rank ends by an error of its own. After a common one, or without others, it does not."""
        self.ends_alone = self.world_size > 1 and not self._failed_together

    def from_first(self, value: Result) -> Result:
        """Returns the value of rank 0."""
        return self.gather(value)[0]

    def ask(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Begins to find out whether a flag is set on any rank; what is returned waits for the answer.

        Between the two a rank may work. Alone it looks at its flag when the answer is wanted.
        """
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag()))
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None

        def answer() -> bool:
            work.wait()
            return bool(flags)

        return answer

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the mean over the ranks of a tensor on the CPU."""
        dist.all_reduce(values, group=self._control)
        return values / self.world_size

    def maximum(self, value: float) -> float:
        """Returns the greatest of the ranks' values."""
        values = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._control)
        return float(values)

    def gather(self, value: Result) -> list[Result]:
        """Returns the ranks' values, by rank. They are pickled."""
        values: list[Result | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values  # type: ignore[return-value]  # all are filled

    def barrier(self) -> None:
        """Waits until every rank is here."""
        dist.barrier(group=self._control)

    def leave(self) -> None:
        """Ends the group, but not from a rank that ends alone.

        After a common failure the others wait until rank 0 has said why.
        """
        if self.ends_alone:
            return
        if self._failed_together:
            self.barrier()
        dist.destroy_process_group()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Joins the ranks that a launcher started, or makes a group of one; leaves it at the end.

    After an error of one rank alone that rank is still in it: such a process is ended by
    :func:`train.ending.end_process`.
    """
    ranks_from_slurm(os.environ)
    let_segments_grow(os.environ)
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")  # else DeepSpeed warns that it guesses
    backend = "nccl" if cuda else "gloo"
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed reads it too
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    ranks = Ranks(device, dist.new_group(backend="gloo") if cuda else None)
    try:
        yield ranks
    except BaseException:
        ranks.fail_alone()
        raise
    finally:
        ranks.leave()
