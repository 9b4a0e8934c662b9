# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""The swap of frames for places around attention along time, in pieces: while one is computed, another travels.

Each rank holds some frames of all places, (B, T', S, D). The places are cut into pieces, and each piece is spread over
the ranks by itself: it sets off, arrives as all frames of some places, (T, B, s, D), is attended to, and sets off back.
So all but the first way there and the last way back can be hidden behind computation, in the backward pass too.

Autograd may not look at what is still travelling. Between setting off and arriving, the graph therefore has a tensor
without values, which says what comes after what; the journey itself is kept beside it. Autograd runs first what was
recorded last, so the backward pass goes through the pieces from the last to the first, and each is under way while the
one before it is computed.

Tokens that come in parcels, (C, T', B, s, D), one for each rank of each piece (``train/ops/parcels.py``), set off from
where they lie, and come back to where they lie: all pieces to one tensor. Others are copied on both sides.

Letters: B batch, T frames, S places of a frame, T' and s a rank's part of them, D width, C parcels.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from train.ops.parcels import Tokens
from train.parallel.exchange import Group, Journey, part_sizes, room_for

PIECES = 2
"""On two H100s steps of STDiT-XL/2 at 256x512x512 take 1,802 ms in two and 2,245 in four, though a forward pass of the
time part by itself takes 5.33 ms in two and 5.09 in four with FlashAttention 3 (at once 5.55)."""
PIECE_TOKENS = 16_384
"""Tokens of a rank's piece below which products do not fill a GPU."""


def number_of_pieces(batch: int, frames: int, places: int, group: Group) -> int:
    """Returns in how many pieces the places of all ranks' tokens are best swapped. All ranks decide alike.

    In a compiled graph nothing is under way while other things are computed: there it is one.

    Args:
        batch: Samples.
        frames: Of all ranks.
        places: Of a frame.
        group: The ranks.
    """
    if torch.compiler.is_compiling():
        return 1
    tokens = batch * frames * places // (PIECES * group.size)
    return PIECES if tokens >= PIECE_TOKENS and places >= PIECES * group.size else 1


def attend_in_pieces(
    x: Tokens,
    group: Group,
    frames: int,
    num_pieces: int,
    attend: Callable[[Float[Tensor, "T B s D"]], Float[Tensor, "T B s D"]],
) -> Tokens:
    """Returns ``attend(x)`` where attend sees all frames of some places, a piece at a time, in the order of x.

    Args:
        x: All places of this rank's frames; in parcels, it has one for each rank of each piece.
        group: The ranks that have the other frames; all of them call it.
        frames: Of all ranks.
        num_pieces: At most as many as there are places for each rank.
        attend: Called for each piece.
    """
    swap = (_Swap if x.ndim == 4 else _ParcelSwap)(group, frames, x.shape, num_pieces)
    marks = _SetOff.apply(x, swap)
    back = []
    for piece, mark in enumerate(marks):
        places: Tensor = _Arrive.apply(mark, swap, piece)
        back.append(_SetOffBack.apply(attend(places), swap, piece))
    out: Tensor = _ArriveBack.apply(swap, *back)
    return out


class _Swap:
    """The journeys of one swap there and back, of tokens or of their gradients: at most one a piece is under way.

    Args:
        group: The ranks.
        frames: Of all ranks.
        shape: Of all places of this rank's frames.
        num_pieces: Of them.
    """

    def __init__(self, group: Group, frames: int, shape: torch.Size, num_pieces: int) -> None:
        self.num_pieces = num_pieces
        self._group, self._frames, self._shape = group, frames, shape
        self._under_way: dict[int, Journey] = {}

    def to_places(self, piece: int, x: Tokens) -> None:
        """Sends a piece of all places of this rank's frames."""
        part = x.split(self._sizes, 2)[piece]
        journey = Journey(part, self._group, (2, 0), (self._sizes[piece], self._frames), (True, False))
        self._under_way[piece] = journey

    def to_frames(self, piece: int, x: Float[Tensor, "T B s D"]) -> None:
        """Sends all frames of this rank's places of a piece."""
        journey = Journey(x, self._group, (0, 2), (self._frames, self._sizes[piece]), (False, True))
        self._under_way[piece] = journey

    def arrived(self, piece: int) -> Float[Tensor, "T B s D"]:
        """Returns the piece that was under way to its places."""
        return self._under_way.pop(piece).arrived()

    def all_arrived(self, like: Tensor) -> Tokens:
        """Returns all pieces that were under way to their frames; ``like`` is any tensor of their type."""
        out = like.new_empty(self._shape)
        for piece, place in enumerate(out.split(self._sizes, 2)):
            self._under_way.pop(piece).arrived(place)
        return out

    @property
    def _sizes(self) -> tuple[int, ...]:
        return part_sizes(self._shape[2], self.num_pieces)


class _ParcelSwap(_Swap):
    """Of tokens in parcels, which are copied nowhere."""

    _room: Tensor | None = None
    """Where pieces come back to, while some are under way there."""

    def to_places(self, piece: int, x: Float[Tensor, "C T' B s D"]) -> None:
        journey = Journey(self._of(piece, x), self._group, (0, 1), (self._group.size, self._frames))
        self._under_way[piece] = journey

    def to_frames(self, piece: int, x: Float[Tensor, "T B s D"]) -> None:
        if self._room is None:
            self._room = room_for(x, self._shape)
        self._under_way[piece] = Journey(
            x.unsqueeze(0),
            self._group,
            (1, 0),
            (self._frames, self._group.size),
            room=self._of(piece, self._room),
        )

    def arrived(self, piece: int) -> Float[Tensor, "T B s D"]:
        return super().arrived(piece).squeeze(0)

    def all_arrived(self, _like: Tensor) -> Float[Tensor, "C T' B s D"]:
        for piece in range(self.num_pieces):
            super().arrived(piece)
        room, self._room = self._room, None
        assert room is not None
        return room

    def _of(self, piece: int, x: Tensor) -> Tensor:
        return x.narrow(0, piece * self._group.size, self._group.size)


class _SetOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, swap: _Swap) -> tuple[Tensor, ...]:
        ctx.swap = swap
        for piece in range(swap.num_pieces):
            swap.to_places(piece, x)
        return tuple(x.new_empty(0) for _ in range(swap.num_pieces))

    @staticmethod
    def backward(ctx: Any, *marks: Tensor) -> tuple[Tensor, None]:
        return ctx.swap.all_arrived(marks[0]), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _mark: Tensor, swap: _Swap, piece: int) -> Tensor:
        ctx.swap, ctx.piece = swap, piece
        return swap.arrived(piece)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.swap.to_frames(ctx.piece, gradients[0])
        return gradients[0].new_empty(0), None, None


class _SetOffBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, swap: _Swap, piece: int) -> Tensor:
        ctx.swap, ctx.piece = swap, piece
        swap.to_frames(piece, x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_marks: Tensor) -> tuple[Tensor, None, None]:
        return ctx.swap.arrived(ctx.piece), None, None


class _ArriveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, swap: _Swap, *marks: Tensor) -> Tensor:
        ctx.swap = swap
        return swap.all_arrived(marks[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pieces = range(ctx.swap.num_pieces)
        for piece in reversed(pieces):  # as they are needed
            ctx.swap.to_places(piece, gradients[0])
        return None, *(gradients[0].new_empty(0) for _ in pieces)
