"""Memory that runs out while a run is built, takes steps, or is judged."""

import errno
from collections.abc import Callable

import pytest
import torch

from shared.errors import InputError
from tests.train.fake_encoders import use_fake_encoders
from tests.train.tape import TapeRecorder
from train.batch_memory import BufferPool
from train.evaluation import Evaluation
from train.memory_needs import need_of_building, need_of_step
from train.out_of_memory import Need, enough_memory, which_memory_ran_out
from train.setup import plan_run
from train.step import TrainingStep
from train.trainer import train

CAPTURE = "CUDA error: operation failed due to a previous error during capture"
DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes")
NEED = Need(doing="step 7", wants="2 samples", device_ways="use less of it", host_ways="use fewer")


class Recorder(TapeRecorder):
    """Runs out of memory while it records, and then fails at ending the recording, as CUDA does."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            work()
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError(CAPTURE)


def raising(error):
    def work(*args, **kwargs):
        raise error

    return work


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
    errors = [None, None, DEVICE]

    def taken(*args):
        error = errors.pop(0)
        if error is not None:
            raise error
        return take(*args)

    monkeypatch.setattr(TrainingStep, "take", taken)
    with pytest.raises(InputError, match=r"step 3: .*device of rank 0 .* --gradient-accumulation, .* more ranks, or"):
        train(small_config, ranks)
    errors[:] = [RuntimeError("another")]
    with pytest.raises(RuntimeError, match="another"):
        train(small_config.changed(output=small_config.output.with_name("other")), ranks)


def test_memory_that_runs_out_where_a_batch_is_read_or_the_model_built_is_one_line(ranks, small_config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("train.loader.SlotFiller.fill", raising(MemoryError()))
        with pytest.raises(InputError, match=r"batch of step 1: the host of rank 0 .*: use a smaller --batch-size, or"):
            train(small_config, ranks)
    monkeypatch.setattr("train.trainer.build_engine", raising(HOST))
    with pytest.raises(InputError, match=r"building the model: the host of rank 0 .*: use fewer ranks a node"):
        train(small_config, ranks)


@pytest.mark.parametrize(("error", "memory"), [(DEVICE, "device"), (HOST, "host")])
def test_memory_that_runs_out_while_a_run_is_judged_is_one_line(ranks, small_config, monkeypatch, error, memory):
    use_fake_encoders(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "losses", raising(error))
        ways = "fewer --evaluate-levels, or leave --evaluate-every out" if memory == "device" else "a smaller --batch"
        with pytest.raises(InputError, match=f"the evaluation after step 2: the {memory} of rank 0 .*: use {ways}"):
            train(small_config.changed(evaluate_every=2, holdout="40%"), ranks)
    monkeypatch.setattr("train.previews.decode_latent", raising(error))
    config = small_config.changed(
        output=small_config.output / "previews", preview_every=3, previews=1, preview_sampling_steps=1
    )
    with pytest.raises(InputError, match=f"the previews after step 3: the {memory} of rank 0 has too little memory"):
        train(config, ranks)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (DEVICE, "device"),
        (RuntimeError("CUDA error: out of memory"), "device"),
        (RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "device"),
        (HOST, "host"),
        (MemoryError(), "host"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
    ],
)
def test_what_libraries_say_of_memory_is_understood(error, memory):
    assert which_memory_ran_out(error) == memory
    with (
        pytest.raises(InputError, match=f"step 7: the {memory} of rank 3 has too little memory for 2 samples: use "),
        enough_memory(NEED, rank=3),
    ):
        raise error


def test_other_errors_are_not_told_as_memory_that_ran_out():
    for error in (RuntimeError(CAPTURE), OSError("out of memory"), OSError(errno.ENOSPC, "No space left on device")):
        assert which_memory_ran_out(error) is None
        with pytest.raises(type(error)) as raised, enough_memory(NEED, rank=0):
            raise error
        assert raised.value is error


@pytest.mark.parametrize(("free", "memory"), [(40 << 30, "host"), (100 << 20, "device")])
def test_memory_that_cannot_be_pinned_is_the_hosts_where_the_device_has_enough(monkeypatch, free, memory):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))
    assert which_memory_ran_out(RuntimeError("CUDA error: out of memory")) == memory
    assert which_memory_ran_out(DEVICE) == "device"


def test_a_batch_that_cannot_be_pinned_is_the_hosts_memory(monkeypatch):
    class Runtime:
        def cudaHostRegister(self, *arguments):  # noqa: N802
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    with pytest.raises(MemoryError, match="4,096 bytes"):
        BufferPool(4096, pin=True).take()


def test_the_line_names_what_the_run_could_do_without(small_config):
    spread = small_config.changed(num_workers=4, zero_stage=3, offload="all")
    assert need_of_step(1, (2, 4, 2, 4, 4), spread).host_ways == (
        "use fewer --num-workers, a smaller --batch-size, --offload none, or fewer ranks a node"
    )
    assert need_of_building(spread).device_ways.startswith("use more ranks")
    assert need_of_building(small_config).device_ways.startswith("use --zero-stage 3")
