"""How long a GPU takes, without what launching kernels costs."""

from collections.abc import Callable


def gpu_milliseconds(run: Callable[[], object]) -> float:
    """Returns the median of some CUDA graphs of many calls of ``run``, by the call."""
    from triton.testing import do_bench_cudagraph  # there with CUDA only

    median: float = do_bench_cudagraph(run, rep=20, return_mode="median")
    return median
