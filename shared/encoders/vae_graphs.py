"""Passes of one shape as CUDA graphs: one launch in place of a hundred.

A pass over 16 frames of 256x256 is about 110 kernels, which take a fast GPU 10 ms. A slow core takes as long to launch
them while other threads of its process want Python's lock, too, and then the GPU waits. A graph holds the same kernels
in the same order, so latents are the same, bit for bit.
"""

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]
"""A pass: from frames to what its kernels write."""

MAX_PIXELS = 32 * 256 * 256
"""Of a pass. Graphs keep the memory of their activations, about 1 kB a pixel of SD's autoencoder, and a larger pass
keeps a GPU busy for longer than its launch takes."""
MAX_GRAPHS = 64
"""Shapes; those that come after them are launched kernel by kernel."""

_log = logging.getLogger(__name__)


class CudaCapture:
    """Makes graphs on a GPU. They share the memory of their activations, so only one may be under way at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._device = device

    def __call__(self, run: Run, units: Tensor) -> Run:
        """Returns ``run`` for units of this shape, as a graph. What a call returns, the next one overwrites.

        Raises:
            RuntimeError: if the memory does not hold it, or a kernel cannot be in a graph.
        """
        taken = units.clone()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):  # libraries prepare what they need on a new stream
            run(taken)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads copy to the CPU meanwhile: of no concern to this one's capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                given = run(taken)
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own

        def replay(units: Tensor) -> Tensor:
            taken.copy_(units)
            graph.replay()
            return given

        return replay


class PassGraphs:
    """Runs passes, from the second of a shape on as graphs.

    Args:
        run: A pass, launched kernel by kernel. It depends on nothing but its argument.
        capture: Makes a graph of it for one shape.
    """

    def __init__(self, run: Run, capture: Callable[[Run, Tensor], Run]) -> None:
        self._run, self._capture = run, capture
        self._seen: Counter[torch.Size] = Counter()
        self._graphs: dict[torch.Size, Run] = {}
        self._is_on = True

    def __call__(self, units: Tensor) -> Tensor:
        """Returns what a pass over units (N, height, width, 3) gives."""
        if not self._is_on or len(units) * units.shape[1] * units.shape[2] > MAX_PIXELS:
            return self._run(units)
        graph = self._graphs.get(units.shape)
        if graph is None:
            self._seen[units.shape] += 1
            if self._seen[units.shape] == 1 or len(self._graphs) == MAX_GRAPHS:
                return self._run(units)
            graph = self._captured(units)
            if graph is None:
                return self._run(units)
        return graph(units).clone()

    def _captured(self, units: Tensor) -> Run | None:
        """Returns a new graph, or None, from then on, where there can be none."""
        try:
            self._graphs[units.shape] = self._capture(self._run, units)
        except RuntimeError as error:
            _log.warning("passes are launched kernel by kernel: no CUDA graph: %s", str(error).partition("\n")[0])
            self.give_up()
        return self._graphs.get(units.shape)

    def give_up(self) -> bool:
        """Makes no more graphs, and frees the memory of those that there are; returns whether there were any."""
        had_some, self._is_on = bool(self._graphs), False
        self._graphs.clear()
        return had_some
