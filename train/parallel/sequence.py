# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Sequence parallelism: the tokens of the same samples spread over N ranks.

Source: dynamic sequence parallelism, arXiv 2403.10266. Each rank holds some frames of all its samples, whole. Attention
within frames, captions, norms and MLPs then need no other rank; around attention along time one all-to-all swaps frames
for places, and one swaps back: two passes over the tokens, where DeepSpeed-Ulysses (arXiv 2309.14509) needs four, of
queries, keys, values and outputs. Ulysses is taken where all tokens attend to all: heads are spread instead.

Where there are fewer frames than ranks, as in images, or where it leaves less idle, each rank holds some places of all
frames, and the swap is around attention within frames. :func:`spread_places` decides, from the sizes alone, so that all
ranks decide alike.

**Sizes that do not divide** need no padding, hence no masks: parts differ by at most one frame, place or head, and
the collectives take unequal parts.

**Gradients.** Every rank of a group has the same samples and computes the same loss from the merged output. Let g(n) be
the gradient of that loss by way of rank n's tokens; what is wanted is their sum. :meth:`merge` hands back N times rank
n's slice of the output's gradient, so rank n finds N g(n); the engine takes the mean over all ranks, N of which make a
group: the sum of the g(n), averaged over the groups. Weights that are used on whole tokens, before the split or after
the merge, come out right as well: before it each rank finds its N g(n), after it each rank finds the whole gradient,
whose mean is itself. So ZeRO runs over all ranks at any stage and knows nothing of groups.

Letters: B batch, T frames, S tokens of a frame, T' and S' this rank's part, D width, H heads, P head width.
"""

from functools import partial

import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shared.errors import InputError
from shared.wording import counted
from train.model.layout import Attend, AttendHeads, LayoutFor, TokenLayout, WholeLayout
from train.ops.parcels import Tokens
from train.parallel.exchange import (
    Group,
    exchange,
    frames_to_places,
    gather_parts,
    places_to_frames,
    take_part,
)
from train.parallel.pieces import attend_in_pieces, number_of_pieces

_SWAPPED_SHARE = 4 / 18
"""Of the products of a token, 18 D^2 a block, 4 D^2 lie in the attention around which tokens are swapped."""


class SequenceParallel:
    """The sequence group of this rank: ``degree`` neighbouring ranks. All ranks of the run build it.

    Args:
        degree: Ranks that share the tokens of a sample.

    Raises:
        InputError: if the ranks cannot be divided so.
    """

    def __init__(self, degree: int) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        require_degree(degree, world_size)
        self.degree = degree
        self.data_rank, self.num_data_ranks = rank // degree, world_size // degree
        handles = [
            dist.new_group(list(range(first, first + degree))) if degree > 1 else None
            for first in range(0, world_size, degree)
        ]
        self._group = Group(handles[self.data_rank], rank % degree, degree)
        self.in_pieces = True
        """Whether large swaps go in pieces (``pieces.py``)."""

    def layout_for(self, batch: int, frames: int, frame_tokens: int) -> TokenLayout:
        """Returns the layout of a forward pass of ``batch`` samples; see :data:`train.model.layout.LayoutFor`.

        Raises:
            InputError: if there are fewer frames and fewer tokens of a frame than ranks.
        """
        return _layout_of(self._group, self.in_pieces, batch, frames, frame_tokens)


def busiest_layout(degree: int, *, in_pieces: bool) -> LayoutFor:
    """Returns the layouts of the rank that has most of the tokens, for a model without content: none are exchanged.

    Args:
        degree: Ranks that share the tokens of a sample.
        in_pieces: Whether large swaps go in pieces.
    """
    return partial(_layout_of, Group(None, 0, degree), in_pieces)  # larger parts come first


def _layout_of(group: Group, in_pieces: bool, batch: int, frames: int, frame_tokens: int) -> TokenLayout:
    if group.size == 1:
        return WholeLayout()
    require_size(frames, frame_tokens, group.size)
    if spread_places(batch, frames, frame_tokens, group.size):
        return PlacesLayout(group, batch, frames, frame_tokens)
    return FramesLayout(group, batch, frames, frame_tokens, in_pieces=in_pieces)


def require_degree(degree: int, world_size: int) -> None:
    """Raises :class:`InputError` if ``degree`` does not divide the ranks."""
    if degree < 1 or world_size % degree:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise InputError(
            f"sequence_parallel={degree} does not divide the {counted(world_size, 'rank')}: use "
            f"{' or '.join(map(str, divisors))}, or another number of ranks"
        )


def require_size(frames: int, frame_tokens: int, degree: int) -> None:
    """Raises :class:`InputError` if some of ``degree`` ranks would have no token."""
    if max(frames, frame_tokens) < degree:
        raise InputError(
            f"sequence_parallel={degree} cannot spread {counted(frames, 'frame')} of {counted(frame_tokens, 'token')}: "
            "use a smaller degree, or larger buckets"
        )


def require_heads(heads: int, degree: int) -> None:
    """Raises :class:`InputError` if some of ``degree`` ranks would have no head of an attention among all tokens."""
    if heads < degree:
        raise InputError(
            f"sequence_parallel={degree} spreads the heads of full attention, and this model has {heads}: use at most "
            f"{heads}"
        )


def spread_places(batch: int, frames: int, frame_tokens: int, degree: int) -> bool:
    """Returns whether to spread the places of a frame rather than the frames.

    Either way the same bytes travel; what differs is how many tokens the busiest rank has, outside and inside of the
    attention that is swapped.
    """
    if frames < degree or frame_tokens < degree:
        return frames < degree

    def parts(total: int) -> int:
        return -(-total // degree)

    whole = batch * frames * frame_tokens
    by_frames = batch * parts(frames) * frame_tokens, batch * frames * parts(frame_tokens)
    by_places = batch * frames * parts(frame_tokens), parts(batch * frames) * frame_tokens

    def cost(tokens: tuple[int, int]) -> float:
        return ((1 - _SWAPPED_SHARE) * tokens[0] + _SWAPPED_SHARE * tokens[1]) / whole

    return cost(by_places) < cost(by_frames) - 1e-9


class FramesLayout:
    """Each rank has some of the frames, whole: (B, T', S, D)."""

    moves_along_space, moves_along_time = False, True

    def __init__(self, group: Group, batch: int, frames: int, frame_tokens: int, *, in_pieces: bool) -> None:
        self._group, self._batch, self._frames, self._frame_tokens = group, batch, frames, frame_tokens
        self._in_pieces = in_pieces

    @property
    def parcels_along_time(self) -> int | None:
        """One for each rank, of each piece; None where places do not divide so."""
        parcels = self._num_pieces() * self._group.size
        return None if self._frame_tokens % parcels else parcels

    def _num_pieces(self) -> int:
        if not self._in_pieces:
            return 1
        return number_of_pieces(self._batch, self._frames, self._frame_tokens, self._group)

    def split(self, x: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T' S D"]:
        return take_part(x, self._group, 1).contiguous()

    def merge(self, x: Float[Tensor, "B T' S D"]) -> Float[Tensor, "B T S D"]:
        return gather_parts(x, self._group, dim=1, total=self._frames)

    def split_frames(self, values: Float[Tensor, "B T D"]) -> Float[Tensor, "B T' D"]:
        return take_part(values, self._group, 1)

    def along_space(self, x: Float[Tensor, "B T' S D"], attend: Attend) -> Float[Tensor, "B T' S D"]:
        return attend(x)

    def along_time(self, x: Tokens, attend: Attend) -> Tokens:
        def attend_all(x: Float[Tensor, "T B s D"]) -> Float[Tensor, "T B s D"]:
            places = x.flatten(1, 2).unsqueeze(0)  # those of all samples, as one sample's
            return _attend_something(places, 2, attend).view(x.shape)

        if (num_pieces := self._num_pieces()) > 1:
            return attend_in_pieces(x, self._group, self._frames, num_pieces, attend_all)
        if x.ndim == 5:
            x = exchange(x, self._group, scatter=0, gather=1, gathered=self._frames)
            along = attend_all(x.squeeze(0)).unsqueeze(0)
            return exchange(along, self._group, scatter=1, gather=0, gathered=self._group.size)
        along = attend_all(frames_to_places(x, self._group, self._frames))
        return places_to_frames(along, self._group, self._frame_tokens)

    def along_all(self, qkv: Float[Tensor, "B T' S 3 H P"], attend: AttendHeads) -> Float[Tensor, "B T' S H P"]:
        return _attend_by_heads(self._group, qkv, attend, dim=1, total=self._frames)


class PlacesLayout:
    """Each rank has some places of every frame: (B, T, S', D)."""

    moves_along_space, moves_along_time = True, False
    parcels_along_time = None

    def __init__(self, group: Group, batch: int, frames: int, frame_tokens: int) -> None:
        self._group, self._batch, self._frames, self._frame_tokens = group, batch, frames, frame_tokens

    def split(self, x: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T S' D"]:
        return take_part(x, self._group, 2).contiguous()

    def merge(self, x: Float[Tensor, "B T S' D"]) -> Float[Tensor, "B T S D"]:
        return gather_parts(x, self._group, dim=2, total=self._frame_tokens)

    def split_frames(self, values: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return values

    def along_space(self, x: Float[Tensor, "B T S' D"], attend: Attend) -> Float[Tensor, "B T S' D"]:
        shape = x.shape
        x = x.flatten(0, 1).unsqueeze(1)  # (B*T, 1, S', D): the frames of all samples are spread
        x = exchange(x, self._group, scatter=0, gather=2, gathered=self._frame_tokens)
        x = _attend_something(x, 0, attend)
        x = exchange(x, self._group, scatter=2, gather=0, gathered=self._batch * self._frames)
        return x.view(shape)

    def along_time(self, x: Float[Tensor, "B T S' D"], attend: Attend) -> Float[Tensor, "B T S' D"]:
        return attend(x)

    def along_all(self, qkv: Float[Tensor, "B T S' 3 H P"], attend: AttendHeads) -> Float[Tensor, "B T S' H P"]:
        return _attend_by_heads(self._group, qkv, attend, dim=2, total=self._frame_tokens)


def _attend_something(x: Tensor, dim: int, attend: Attend) -> Tensor:
    """Returns ``attend(x)`` also for a rank that the swap left without any sequence.

    It attends to one of zeros and drops the result: under ZeRO 3 all ranks gather each layer's weights together, in
    the backward pass too, and kernels need not take empty tensors.
    """
    if x.shape[dim]:
        return attend(x)
    padding = [0, 0] * (x.ndim - 1 - dim) + [0, 1]
    return attend(F.pad(x, padding)).narrow(dim, 0, 0)


def _attend_by_heads(group: Group, qkv: Tensor, attend: AttendHeads, *, dim: int, total: int) -> Tensor:
    """Returns ``attend`` over all tokens by this rank's heads, back in the layout that they came in.

    Args:
        group: The sequence group.
        qkv: (B, T', S', 3, H, P).
        attend: Over (B, T*S, 3, h, P).
        dim: 1 if frames are spread, 2 if places are.
        total: How many of them there are.

    Raises:
        InputError: if there are fewer heads than ranks.
    """
    heads = qkv.shape[4]
    require_heads(heads, group.size)
    qkv = exchange(qkv, group, scatter=4, gather=dim, gathered=total)  # (B, T, S, 3, h, P)
    out = attend(qkv.flatten(1, 2)).unflatten(1, qkv.shape[1:3])
    return exchange(out, group, scatter=dim, gather=3, gathered=heads)
