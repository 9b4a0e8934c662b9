"""Forward and backward passes as CUDA graphs: what a pass launches is recorded once, and launched as one afterwards.

The thread that launches takes some 50 microseconds for each of the thousands of operations of a pass; a graph's it does
not see. A graph holds for one shape of batches. All graphs of a run share one pool of memory, which is as large as a
pass needs and is used by nothing else: so while there are graphs, passes of a shape that is not recorded would need as
much again. What the driver keeps of each graph is outside of it, and in no count.

- The first pass of a shape runs by itself, so that kernels are compiled and libraries have chosen theirs. Graphs that
  were there are given up before, and their memory with them.
- The next pass of the shape is recorded, which computes nothing, and is launched like those after it.

What changes from step to step reaches a graph through tensors that stay where they are, and the gradients come out of
it in such tensors (:meth:`train.parallel.lean_zero.LeanZero.keep_places`).
"""

import dataclasses
import gc
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from train.conditions import Conditions
from train.data import Batch
from train.diffusion.terms import LossTerms
from train.parallel.lean_zero import Gathered, LeanZero

Shape = tuple[tuple[str, torch.Size, torch.dtype], ...]
"""Of all that a pass reads, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassInputs:
    """All that a pass reads of B samples, on the model's device."""

    conditions: Conditions
    x0: Tensor
    """(B, C, T, H, W) latents, float32."""
    u: Tensor
    """(B,) the samples' draws from [0, 1), float64."""
    noise: Tensor
    """(B, C, T, H, W) float32."""

    @classmethod
    def of_batch(cls, batch: Batch, frame_mask: Tensor | None, caption_length: int) -> "PassInputs":
        """Returns what a pass reads of a batch.

        Args:
            batch: On the model's device.
            frame_mask: (B, T) False at frames that are given; None: all are made.
            caption_length: To which captions are padded further, so that batches of several lengths have one shape;
                longer ones stay as they are, for the model to refuse.
        """
        conditions = Conditions.of_batch(batch, frame_mask)
        more = 0 if conditions.mask is None else caption_length - conditions.mask.shape[1]
        if conditions.mask is not None and more > 0:
            conditions = dataclasses.replace(
                conditions,
                captions=F.pad(conditions.captions, (0, 0, 0, more)),
                mask=F.pad(conditions.mask, (0, more)),
            )
        return cls(conditions=conditions, x0=batch.clean_latents(), u=batch.u, noise=batch.noise())

    def tensors(self) -> dict[str, Tensor]:
        """Returns those that there are, by name."""
        named = {field.name: getattr(self.conditions, field.name) for field in dataclasses.fields(Conditions)}
        named |= {"x0": self.x0, "u": self.u, "noise": self.noise}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def shape(self) -> Shape:
        """Returns what a graph is recorded for."""
        return tuple((name, tensor.shape, tensor.dtype) for name, tensor in self.tensors().items())

    def in_room(self, room: Mapping[str, Tensor]) -> "PassInputs":
        """Returns the same in other memory.

        Args:
            room: As many bytes of each tensor, or more, by its name.
        """
        copies = {
            name: room[name][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, tensor in self.tensors().items()
        }
        own = {name: copies.pop(name) for name in ("x0", "u", "noise")}
        copied = PassInputs(conditions=dataclasses.replace(self.conditions, **copies), **own)
        copied.fill(self)
        return copied

    def fill(self, inputs: "PassInputs") -> None:
        """Copies other inputs of the same shape here."""
        others = inputs.tensors()
        for name, tensor in self.tensors().items():
            tensor.copy_(others[name])


class Recorder(Protocol):
    """Records what is launched on a device."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Returns what launches again, on the current stream, all that ``work`` launches; it computes nothing now."""

    def give_memory_back(self) -> None:
        """Gives back the memory of recordings that nobody holds any more."""


class CudaRecorder:
    """Records CUDA graphs, which share their memory: one at a time may run, and nothing in it outlives a launch but
    what is held."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # other threads of this process (NCCL's watch, the one that pins batches) call CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._pool = graph.pool()
        return graph.replay

    def give_memory_back(self) -> None:
        self._pool = None
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Recording:
    """The graph of a shape, and where it reads and writes."""

    inputs: PassInputs
    launch: Callable[[], None]
    terms: LossTerms
    gathered: Gathered


class PassGraphs:
    """Runs passes, from their second of a shape on by graphs.

    Args:
        run: Computes losses and gradients; the terms are without a graph of PyTorch's.
        gradients: What gathers the gradients.
        recorder: Of the device.
    """

    def __init__(self, run: Callable[[PassInputs], LossTerms], gradients: LeanZero, recorder: Recorder) -> None:
        self._run, self._gradients, self._recorder = run, gradients, recorder
        self._seen: set[Shape] = set()
        self._recordings: dict[Shape, _Recording] = {}
        self._room: dict[str, Tensor] = {}
        """By name, bytes that hold the inputs of any shape: one graph runs at a time."""

    def run(self, inputs: PassInputs) -> LossTerms:
        """Returns the losses of a batch, good until the next one, with its gradients gathered.

        All ranks call it with inputs of one shape.
        """
        shape = inputs.shape()
        if shape not in self._seen:
            self.forget()
            self._seen.add(shape)
            return self._run(inputs)
        recording = self._recordings.get(shape)
        if recording is None:
            recording = self._recordings[shape] = self._record(inputs)
        else:
            recording.inputs.fill(inputs)
        recording.launch()
        self._gradients.have_gathered(recording.gathered)
        return recording.terms

    def forget(self) -> None:
        """Gives up the graphs, and their memory."""
        if self._recordings:
            self._recordings.clear()
            self._room.clear()
            self._gradients.free_places()
            self._recorder.give_memory_back()

    def _record(self, inputs: PassInputs) -> _Recording:
        self._gradients.keep_places()
        if not self._room:
            self._room = self._room_for_all(inputs.x0.device)
        fixed, terms = inputs.in_room(self._room), []

        def work() -> None:
            terms.append(self._run(fixed))
            self._gradients.gather_rest()

        launch = self._recorder.record(work)
        return _Recording(inputs=fixed, launch=launch, terms=terms[-1], gathered=self._gradients.gathered())

    def _room_for_all(self, device: torch.device) -> dict[str, Tensor]:
        sizes: dict[str, int] = {}
        for name, size, dtype in itertools.chain(*self._seen):
            sizes[name] = max(sizes.get(name, 0), size.numel() * dtype.itemsize)
        return {name: torch.empty(size, dtype=torch.uint8, device=device) for name, size in sizes.items()}
