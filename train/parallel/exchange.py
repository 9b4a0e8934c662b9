"""The collectives of sequence parallelism, right in both directions.

Parts may be of unequal sizes, so nothing is ever padded: where a size does not divide, some ranks hold one more.
Tensors without content take the same memory, and meet no other rank. Where somebody looks on, what sets off is one
operator, whose result checkpointing can keep by name: then nothing travels twice. Where several arrive in one room,
there are two: what makes the room, which is kept with all that arrives in it, and what sets off. In a compiled graph
the operator waits for what arrives.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.ops.launching import launches_directly


def part_sizes(total: int, num_parts: int) -> tuple[int, ...]:
    """Returns the sizes of the parts of ``total`` things: they differ by at most one, the larger come first."""
    return tuple(total // num_parts + (part < total % num_parts) for part in range(num_parts))


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that share the tokens of the same samples."""

    handle: dist.ProcessGroup | None
    rank: int
    """This process's, from 0."""
    size: int

    def part(self, total: int) -> slice:
        """Returns this rank's part of ``total`` things."""
        sizes = part_sizes(total, self.size)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])


def exchange(x: Tensor, group: Group, *, scatter: int, gather: int, gathered: int) -> Tensor:
    """Returns x with another dimension spread over the ranks, by one all-to-all. Its gradient goes the way back.

    Args:
        x: Whole along ``scatter``; along ``gather`` this rank's part.
        group: All of its ranks call it.
        scatter: The dimension that is to be spread.
        gather: The dimension that is to be whole.
        gathered: Its whole size.
    """
    out: Tensor = _Exchange.apply(x, group, (scatter, gather), (x.shape[scatter], gathered), (False, False))
    return out


def frames_to_places(x: Tensor, group: Group, frames: int) -> Tensor:
    """Returns all frames of this rank's places, (T, B, S', D), of all places of its frames, (B, T', S, D).

    Frames travel first, so that what arrives is in order however many samples there are: the tokens are copied once.
    """
    out: Tensor = _Exchange.apply(x, group, (2, 0), (x.shape[2], frames), (True, False))
    return out


def places_to_frames(x: Tensor, group: Group, places: int) -> Tensor:
    """Returns all places of this rank's frames, (B, T', S, D), of all frames of its places, (T, B, S', D)."""
    out: Tensor = _Exchange.apply(x, group, (0, 2), (x.shape[0], places), (False, True))
    return out


def take_part(x: Tensor, group: Group, dim: int) -> Tensor:
    """Returns this rank's part of what every rank has whole. Its gradient is zero at the others' parts."""
    part = group.part(x.shape[dim])
    return x.narrow(dim, part.start, part.stop - part.start)


def gather_parts(x: Tensor, group: Group, *, dim: int, total: int) -> Tensor:
    """Returns all ranks' parts, whole on every rank.

    Each rank computes the same loss from it. The gradient of a part is this rank's slice of the loss's gradient, times
    the number of ranks: the mean over ranks, which the engine takes, then is the sum over the parts.
    """
    out: Tensor = _GatherParts.apply(x, group, dim, total)
    return out


class _Exchange(torch.autograd.Function):
    """Of dimensions as they travel: the first two of what is given, or of what is returned, may be swapped for that."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Group,
        dims: tuple[int, int],
        sizes: tuple[int, int],
        swapped: tuple[bool, bool],
    ) -> Tensor:
        ctx.group, ctx.dims, ctx.sizes, ctx.swapped = group, dims, sizes, swapped
        return _all_to_all(x, group, dims, sizes, swapped)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _all_to_all(gradients[0], ctx.group, ctx.dims[::-1], ctx.sizes[::-1], ctx.swapped[::-1])
        return gradient, None, None, None, None


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, total: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        sizes = part_sizes(total, group.size)
        shape = list(x.shape)
        shape[dim] = sizes[0]  # the largest
        sent = x.contiguous()
        if x.shape[dim] != sizes[0]:
            sent = x.new_zeros(shape)
            sent.narrow(dim, 0, x.shape[dim]).copy_(x)
        received = list(x.new_empty([group.size, *shape]))
        if not x.is_meta:
            dist.all_gather(received, sent, group=group.handle)
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(received, sizes, strict=True)], dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return take_part(gradients[0], ctx.group, ctx.dim) * ctx.group.size, None, None, None


def _all_to_all(
    x: Tensor, group: Group, dims: tuple[int, int], whole: tuple[int, int], swapped: tuple[bool, bool]
) -> Tensor:
    """Returns what :func:`exchange` does, of the arguments of :class:`Journey`."""
    return Journey(x, group, dims, whole, swapped, at_once=True).arrived()


_numbers = itertools.count()
_groups: dict[int, Group] = {}
_rooms: dict[int, Tensor] = {}
_works: dict[int, dist.Work] = {}
"""By the number of a journey, what goes past PyTorch's dispatcher: its ranks, where it ends, and how to wait for it."""


def _begin(
    x: Tensor, dim: int, sizes: Sequence[int], received_numels: Sequence[int], at_once: bool, number: int
) -> Tensor:
    """Returns room for what the other ranks send, which is on its way, as are the parts of x along ``dim``."""
    group = _groups[number]
    sent, sent_numels = _pack(x, dim, sizes)
    received = _rooms[number] if number in _rooms else x.new_empty(sum(received_numels))
    work = dist.all_to_all_single(
        received, sent, list(received_numels), sent_numels, group=group.handle, async_op=not at_once
    )
    if work is not None:
        _works[number] = work
    return received


_begin_operator = torch.library.custom_op("latentmill_exchange::begin", mutates_args=())(_begin)


@_begin_operator.register_fake
def _(x: Tensor, dim: int, sizes: Sequence[int], received_numels: Sequence[int], at_once: bool, number: int) -> Tensor:
    return x.new_empty(sum(received_numels))


@torch.library.custom_op("latentmill_exchange::begin_in_room", mutates_args=())
def _begin_in_room_operator(
    x: Tensor, dim: int, sizes: Sequence[int], received_numels: Sequence[int], at_once: bool, number: int
) -> Tensor:
    """The same into room that there is. Its result has no values: kept, it says that this has arrived there already."""
    _begin(x, dim, sizes, received_numels, at_once, number)
    return x.new_empty(0)


@_begin_in_room_operator.register_fake
def _(x: Tensor, dim: int, sizes: Sequence[int], received_numels: Sequence[int], at_once: bool, number: int) -> Tensor:
    return x.new_empty(0)


@torch.library.custom_op("latentmill_exchange::room", mutates_args=())
def _room_operator(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


@_room_operator.register_fake
def _(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


def room_for(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns room for several journeys of tensors like x. Checkpointing that keeps what arrives keeps all of it."""
    return x.new_empty(shape) if launches_directly(x) else _room_operator(x, shape)


@torch.library.custom_op("latentmill_exchange::all_at_once", mutates_args=())
def _all_at_once(x: Tensor, dim: int, sizes: Sequence[int], received_numels: Sequence[int], group_name: str) -> Tensor:
    """Returns what the other ranks send. In compiled graphs, which know the ranks by their group's name alone."""
    sent, sent_numels = _pack(x, dim, sizes)
    received = x.new_empty(sum(received_numels))
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined,arg-type]
    dist.all_to_all_single(received, sent, list(received_numels), sent_numels, group=group)
    return received


@_all_at_once.register_fake
def _(x: Tensor, dim: int, sizes: Sequence[int], received_numels: Sequence[int], group_name: str) -> Tensor:
    return x.new_empty(sum(received_numels))


class Journey:
    """A tensor on its way: another dimension is being spread over the ranks, by one all-to-all.

    Args:
        x: Whole along the first of ``dims``.
        group: All of its ranks call it.
        dims: The dimension that is to be spread, and that which is to be whole.
        whole: Their sizes.
        swapped: Whether the first two dimensions are swapped before x travels, and after.
        at_once: Whether what is launched next waits for it anyway.
        room: From :func:`room_for`, contiguous: where it ends, if it lies there as it comes. None: in room of its own.
    """

    def __init__(
        self,
        x: Tensor,
        group: Group,
        dims: tuple[int, int],
        whole: tuple[int, int],
        swapped: tuple[bool, bool] = (False, False),
        *,
        at_once: bool = False,
        room: Tensor | None = None,
    ) -> None:
        scatter, self._gather = dims
        self._swapped = swapped[1]
        x = x.transpose(0, 1) if swapped[0] else x
        sizes = part_sizes(whole[0], group.size)
        self._shapes = []
        for count in part_sizes(whole[1], group.size):
            shape = list(x.shape)
            shape[scatter], shape[self._gather] = sizes[group.rank], count
            self._shapes.append(shape)
        self._numels = [_numel(shape) for shape in self._shapes]
        self._packed = _pack(x, scatter, sizes)[0] if x.is_meta else None  # counted as long as it is needed
        self._work = None
        if torch.compiler.is_compiling():
            assert group.handle is not None
            self._received = _all_at_once(x, scatter, list(sizes), self._numels, group.handle.group_name)
            return
        number = next(_numbers)
        _groups[number] = group
        if room is not None:
            assert all(size == 1 for size in self._shapes[0][: self._gather])
            _rooms[number] = room.view(-1)
        operator = _begin_operator if room is None else _begin_in_room_operator
        begin = _begin if launches_directly(x) else operator
        received = begin(x, scatter, list(sizes), self._numels, at_once, number)
        self._received = received if room is None else _rooms.pop(number)
        del _groups[number]
        self._work = _works.pop(number, None)  # nothing travels again what checkpointing has kept

    def arrived(self, out: Tensor | None = None) -> Tensor:
        """Returns what has arrived, whole along the second dimension; the device waits for it, not the host.

        Args:
            out: Where it is to lie.
        """
        if self._work is not None:
            self._work.wait()
        self._packed = None
        return _unpack(self._received, self._shapes, self._numels, self._gather, swapped=self._swapped, out=out)


def _pack(x: Tensor, dim: int, sizes: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Returns the parts of x along ``dim``, end to end, and their numbers of values.

    One pass over x, and none if all dimensions before ``dim`` have size 1.
    """
    numels = [x.numel() // max(x.shape[dim], 1) * size for size in sizes]
    if all(size == 1 for size in x.shape[:dim]):
        return x.contiguous().view(-1), numels
    if sizes[0] == sizes[-1]:
        parts = _wide(x).unflatten(dim, (len(sizes), sizes[0])).movedim(dim, 0)
        return parts.contiguous().view(x.dtype).view(-1), numels
    packed = x.new_empty(x.numel())
    for place, part in zip(packed.split(numels), x.split(sizes, dim), strict=True):
        _copy(place.view(part.shape), part)
    return packed, numels


def _unpack(
    packed: Tensor,
    shapes: Sequence[list[int]],
    numels: list[int],
    dim: int,
    *,
    swapped: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Returns the parts of the given shapes joined along ``dim``, in one pass over them.

    Args:
        packed: The parts, end to end.
        shapes: Theirs.
        numels: Their numbers of values.
        dim: Where they are joined: without ``out`` no copy if all dimensions before it have size 1.
        swapped: Whether the first two dimensions are to be swapped; ``dim`` comes after them.
        out: Where they are to lie.
    """
    first = 1 if swapped else 0
    if out is not None:
        parts = [part.view(shape).transpose(first, 0) for part, shape in zip(packed.split(numels), shapes, strict=True)]
        for place, part in zip(out.split([part.shape[dim] for part in parts], dim), parts, strict=True):
            _copy(place, part)
        return out
    if all(size == 1 for size in shapes[0][:dim]):
        shape = list(shapes[0])
        shape[dim] = sum(part[dim] for part in shapes)
        return packed.view(shape)
    if shapes[0] == shapes[-1]:
        together = _wide(packed.view(len(shapes), *shapes[0])).movedim(0, dim)
        return together.transpose(first, 0).flatten(dim, dim + 1).view(packed.dtype)
    parts = [part.view(shape) for part, shape in zip(packed.split(numels), shapes, strict=True)]
    return torch.cat([part.transpose(first, 0) for part in parts], dim)


_WIDE = torch.complex128


def _wide(x: Tensor) -> Tensor:
    """Returns x as rows of 16 bytes each value, where they are: a copy that changes strides then moves so much at once,
    where PyTorch's takes values one by one. In compiled graphs, whose copies are their own, it is x."""
    if torch.compiler.is_compiling():
        return x
    size, width = x.element_size(), _WIDE.itemsize
    numbers = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    fits = x.stride(-1) == 1 and not any(number * size % width for number in numbers)
    return x.view(_WIDE) if fits else x


def _copy(to: Tensor, x: Tensor) -> None:
    wide_to, wide_x = _wide(to), _wide(x)
    if wide_to.dtype == wide_x.dtype:
        wide_to.copy_(wide_x)
    else:
        to.copy_(x)


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
