# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""The swap of frames for places around attention along time, in pieces: while one is computed, another travels.

Each rank holds some frames of all places, (B, T', S, D). The places are cut into pieces, and each piece is spread over
the ranks by itself: it sets off, arrives as all frames of some places, (T, B, s, D), is attended to, and sets off back.
So all but the first way there and the last way back can be hidden behind computation, in the backward pass too.

Autograd may not look at what is still travelling. Between setting off and arriving, the graph therefore has a tensor
without values, which says what comes after what; the journey itself is kept beside it. Autograd runs first what was
recorded last, so the backward pass goes through the pieces from the last to the first, and each is under way while the
one before it is computed.

Letters: B batch, T frames, S places of a frame, T' and s a rank's part of them, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from train.parallel.exchange import Group, Journey, part_sizes

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
    x: Float[Tensor, "B T' S D"],
    group: Group,
    frames: int,
    num_pieces: int,
    attend: Callable[[Float[Tensor, "T B s D"]], Float[Tensor, "T B s D"]],
) -> Float[Tensor, "B T' S D"]:
    """Returns ``attend(x)`` where attend sees all frames of some places, a piece at a time.

    Args:
        x: All places of this rank's frames.
        group: The ranks that have the other frames; all of them call it.
        frames: Of all ranks.
        num_pieces: At most as many as there are places for each rank.
        attend: Called for each piece.
    """
    swap = _Swap(group, frames, part_sizes(x.shape[2], num_pieces))
    marks = _SetOff.apply(x, swap)
    back = []
    for piece, mark in enumerate(marks):
        places: Tensor = _Arrive.apply(mark, swap, piece)
        back.append(_SetOffBack.apply(attend(places), swap, piece))
    out: Tensor = _ArriveBack.apply(swap, x.shape, *back)
    return out


class _Swap:
    """The journeys of one swap there and back, of tokens or of their gradients: at most one a piece is under way."""

    def __init__(self, group: Group, frames: int, sizes: tuple[int, ...]) -> None:
        self._group, self._frames = group, frames
        self.sizes = sizes
        """Places of each piece."""
        self._under_way: dict[int, Journey] = {}

    def to_places(self, piece: int, x: Float[Tensor, "B T' S D"]) -> None:
        """Sends a piece of all places of this rank's frames."""
        part = x.split(self.sizes, 2)[piece]
        journey = Journey(part, self._group, (2, 0), (self.sizes[piece], self._frames), (True, False))
        self._under_way[piece] = journey

    def to_frames(self, piece: int, x: Float[Tensor, "T B s D"]) -> None:
        """Sends all frames of this rank's places of a piece."""
        journey = Journey(x, self._group, (0, 2), (self._frames, self.sizes[piece]), (False, True))
        self._under_way[piece] = journey

    def arrived(self, piece: int) -> Tensor:
        """Returns the piece that was under way."""
        return self._under_way.pop(piece).arrived()

    def all_arrived(self, out: Float[Tensor, "B T' S D"]) -> Tensor:
        """Returns ``out``, with all pieces that were under way in it."""
        for piece, place in enumerate(out.split(self.sizes, 2)):
            self._under_way.pop(piece).arrived(place)
        return out


class _SetOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, swap: _Swap) -> tuple[Tensor, ...]:
        ctx.swap, ctx.shape = swap, x.shape
        for piece in range(len(swap.sizes)):
            swap.to_places(piece, x)
        return tuple(x.new_empty(0) for _ in swap.sizes)

    @staticmethod
    def backward(ctx: Any, *marks: Tensor) -> tuple[Tensor, None]:
        return ctx.swap.all_arrived(marks[0].new_empty(ctx.shape)), None


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
    def forward(ctx: Any, swap: _Swap, shape: torch.Size, *marks: Tensor) -> Tensor:
        ctx.swap = swap
        return swap.all_arrived(marks[0].new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pieces = range(len(ctx.swap.sizes))
        for piece in reversed(pieces):  # as they are needed
            ctx.swap.to_places(piece, gradients[0])
        return None, None, *(gradients[0].new_empty(0) for _ in pieces)
