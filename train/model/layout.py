# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Where a model's tokens lie: all in this process, or spread over ranks by whoever puts another layout in.

The models compute with tokens (B, T, S, D) and ask the layout wherever tokens must meet: within a frame, along time, or
all of them. Everything else is done token by token and needs no other rank. So sequence parallelism is an
implementation of :class:`TokenLayout`, in ``train/parallel``, and the models know nothing of it.

Letters: B batch, T frames, S tokens of a frame, T' and S' this process's part of them, D width, H heads, P head width,
C parcels, s places of a parcel.
"""

from collections.abc import Callable
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from train.ops.parcels import Tokens

Attend = Callable[[Tensor], Tensor]
"""Tokens (B, t, s, D) -> tokens (B, t, s, D)."""
AttendHeads = Callable[[Tensor], Tensor]
"""Queries, keys and values (B, T*S, 3, h, P) of some heads -> (B, T*S, h, P)."""


class TokenLayout(Protocol):
    """How the tokens of one forward pass are spread. Made anew for each size by what the model is given.

    Attributes:
        moves_along_space: Whether :meth:`along_space` gives ``attend`` other tokens than it is given.
        moves_along_time: The same of :meth:`along_time`.
    """

    moves_along_space: bool
    moves_along_time: bool

    @property
    def parcels_along_time(self) -> int | None:
        """In how many parcels of the places :meth:`along_time` would rather be given tokens, and then returns them, as
        they travel so (:mod:`train.ops.parcels`); None: in order only."""

    def split(self, x: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T' S' D"]:
        """Returns this process's part of tokens that every process has whole."""

    def merge(self, x: Float[Tensor, "B T' S' D"]) -> Float[Tensor, "B T S D"]:
        """Returns all tokens, whole in every process; the inverse of :meth:`split`."""

    def split_frames(self, values: Float[Tensor, "B T D"]) -> Float[Tensor, "B T' D"]:
        """Returns what belongs to the frames of this process's tokens."""

    def along_space(self, x: Float[Tensor, "B T' S' D"], attend: Attend) -> Float[Tensor, "B T' S' D"]:
        """Returns ``attend(x)`` where attend sees whole frames, (B, t, S, D), of some frames."""

    def along_time(self, x: Tokens, attend: Attend) -> Tokens:
        """Returns ``attend(x)`` where attend sees all frames, (b, T, s, D), of some places.

        Those of several samples may come side by side, as of one. Tokens (B, T', S', D) are returned so, and those in
        parcels, (C, T', B, s, D), in those.
        """

    def along_all(self, qkv: Float[Tensor, "B T' S' 3 H P"], attend: AttendHeads) -> Float[Tensor, "B T' S' H P"]:
        """Returns ``attend(qkv)`` where attend sees all tokens, in the order of (T, S), of some heads."""


class WholeLayout:
    """All tokens in one process."""

    moves_along_space = moves_along_time = False
    parcels_along_time = None

    def split(self, x: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T S D"]:
        return x

    def merge(self, x: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T S D"]:
        return x

    def split_frames(self, values: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return values

    def along_space(self, x: Float[Tensor, "B T S D"], attend: Attend) -> Float[Tensor, "B T S D"]:
        return attend(x)

    def along_time(self, x: Float[Tensor, "B T S D"], attend: Attend) -> Float[Tensor, "B T S D"]:
        return attend(x)

    def along_all(self, qkv: Float[Tensor, "B T S 3 H P"], attend: AttendHeads) -> Float[Tensor, "B T S H P"]:
        return attend(qkv.flatten(1, 2)).unflatten(1, qkv.shape[1:3])


LayoutFor = Callable[[int, int, int], TokenLayout]
"""(B, T, S) -> the layout of a forward pass of that size."""


def whole_layout(_batch: int, _frames: int, _frame_tokens: int) -> TokenLayout:
    """Returns the layout of one process, for any size: the models' default."""
    return WholeLayout()
