"""Memory that runs out in a step of the trainer."""

from collections.abc import Callable

import pytest
import torch

from shared.errors import InputError
from tests.train.tape import TapeRecorder
from train.out_of_memory import enough_memory, ran_out_of_memory
from train.setup import plan_run
from train.step import TrainingStep
from train.trainer import train

CAPTURE = "CUDA error: operation failed due to a previous error during capture"


class Recorder(TapeRecorder):
    """Runs out of memory while it records, and then fails at ending the recording, as CUDA does."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            work()
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError(CAPTURE)


def test_memory_that_runs_out_while_a_graph_is_recorded_is_told_as_such(ranks, small_config, monkeypatch):
    monkeypatch.setattr("train.trainer.CudaRecorder", Recorder)
    monkeypatch.setattr(
        "train.trainer.check_run",
        lambda config, ranks: plan_run(config, data_rank=0, num_data_ranks=1, device_type="cpu"),
    )
    config = small_config.changed(buckets=("2x32x32",), cuda_graphs=True)
    told = r"step 2: the device of rank 0 has too little memory for 4 samples .* --batch-size, leave --cuda-graphs out,"
    with pytest.raises(InputError, match=told):
        train(config, ranks)


def test_memory_that_runs_out_in_a_step_is_one_line_and_other_errors_stay(ranks, small_config, monkeypatch):
    take = TrainingStep.take
    errors = [None, None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")]

    def taken(*args):
        error = errors.pop(0)
        if error is not None:
            raise error
        return take(*args)

    monkeypatch.setattr(TrainingStep, "take", taken)
    with pytest.raises(InputError, match=r"step 3: .* of rank 0 .* --gradient-accumulation, .* more ranks, or"):
        train(small_config, ranks)
    errors[:] = [RuntimeError("another")]
    with pytest.raises(RuntimeError, match="another"):
        train(small_config.changed(output=small_config.output.with_name("other")), ranks)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_what_libraries_say_of_memory_is_understood(said):
    assert ran_out_of_memory(RuntimeError(said))
    assert not ran_out_of_memory(RuntimeError(CAPTURE))
    assert not ran_out_of_memory(OSError("out of memory"))
    with (
        pytest.raises(InputError, match="step 7: the device of rank 3 has too little memory for 2 samples"),
        enough_memory(step=7, rank=3, latents=(2, 4, 8, 32, 32), graphs=False),
    ):
        raise RuntimeError(said)
