# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Attention with its weights: within a frame, along time, among all tokens, and to the caption.

Each asks the layout to bring together the tokens that must meet. The parameters' names are those of the published
weights. Tokens may come in 8 bits too (``rows``), where :meth:`SelfAttention.rows_for` gave what writes them room.

Letters: B batch, T frames, S tokens of a frame, N tokens, L caption tokens, D width, H heads, P head width.
"""

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from train.model.attention import AttentionBackend, KeyMask, attention, caption_attention, packed_attention
from train.model.config import ModelConfig
from train.model.layers import Linear, rows_for
from train.model.layout import TokenLayout
from train.model.long_time_attention import is_long, long_time_attention
from train.ops.float8 import Float8Rows, with_rows
from train.ops.modulation import writes_parcels
from train.ops.parcels import Tokens
from train.ops.qk_norm import qk_norm
from train.ops.qk_norm_op import RMS_NORM_EPS
from train.ops.time_attention import time_attention

Rope = tuple[Float[Tensor, "T P/2"], Float[Tensor, "T P/2"]]
"""Cosines and sines of the angles by which queries and keys are turned."""


class SelfAttention(nn.Module):
    """The weights of attention among tokens; who meets whom is the subclasses'."""

    def __init__(self, config: ModelConfig, backend: AttentionBackend | None, *, qk_norm: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.backend = backend
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.q_norm = nn.RMSNorm(config.head_size, eps=RMS_NORM_EPS) if qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_size, eps=RMS_NORM_EPS) if qk_norm else None

    def rows_for(self, x: Float[Tensor, "B T S D"], layout: TokenLayout) -> Float8Rows | None:
        """Returns room for as many tokens as x in 8 bits, for what writes them just before this reads them.

        It is None where the layout brings other tokens here, which the first product converts by itself, and where
        :func:`train.model.layers.rows_for` says so.
        """
        return None if self._moved_by(layout) else rows_for(self.qkv, x)

    def parcels_for(self, _x: Float[Tensor, "B T S D"], _layout: TokenLayout) -> int | None:
        """Returns in how many parcels whatever writes tokens like x just before this reads them is to write them.

        It is None for in order. Those given back lie as those given.
        """
        return None

    @abstractmethod
    def _moved_by(self, layout: TokenLayout) -> bool:
        """Whether a layout brings other tokens to the first product than this is given."""

    def attend(self, qkv: Float[Tensor, "B N 3 H P"]) -> Float[Tensor, "B N H P"]:
        """Returns the attention of each sequence to itself, of queries and keys normalised if the model does that."""
        if self.q_norm is None or self.k_norm is None:
            return packed_attention(qkv, backend=self.backend)
        return attention(*qk_norm(qkv, self.q_norm.weight, self.k_norm.weight), backend=self.backend)


class SpaceAttention(SelfAttention):
    """Attention among the tokens of each frame."""

    def _moved_by(self, layout: TokenLayout) -> bool:
        return layout.moves_along_space

    def forward(
        self, x: Float[Tensor, "B T S D"], layout: TokenLayout, rows: Float8Rows | None = None
    ) -> Float[Tensor, "B T S D"]:
        def within_frames(tokens: Tensor) -> Tensor:
            assert rows is None or tokens is x
            B, T, S, _ = tokens.shape
            qkv = self.qkv(with_rows(tokens, rows)).view(B * T, S, 3, self.num_heads, -1)
            return self.proj(self.attend(qkv).reshape(tokens.shape))

        return layout.along_space(x, within_frames)


class TimeAttention(SelfAttention):
    """Attention along time among the tokens of each place of the frame."""

    def _moved_by(self, layout: TokenLayout) -> bool:
        return layout.moves_along_time

    def parcels_for(self, x: Float[Tensor, "B T S D"], layout: TokenLayout) -> int | None:
        return layout.parcels_along_time if layout.moves_along_time and writes_parcels(x) else None

    def forward(
        self,
        x: Tokens,
        layout: TokenLayout,
        rows: Float8Rows | None = None,
        *,
        positions: Float[Tensor, "1 T 1 D"] | None = None,
        rope: Rope | None = None,
    ) -> Tokens:
        """Returns the attended tokens.

        Args:
            x: Tokens, in as many parcels as :meth:`parcels_for` said.
            layout: Where they lie.
            rows: They in 8 bits; not with positions.
            positions: Added to the tokens of all frames first.
            rope: Angles of all frames by which queries and keys are turned.
        """
        q_norm = None if self.q_norm is None else self.q_norm.weight
        k_norm = None if self.k_norm is None else self.k_norm.weight

        def along_time(tokens: Tensor) -> Tensor:
            assert rows is None or tokens is x
            read = with_rows(tokens, rows) if positions is None else tokens + positions
            qkv = self.qkv(read).view(*tokens.shape[:3], 3, self.num_heads, -1)
            if is_long(qkv):
                out = long_time_attention(qkv, q_norm=q_norm, k_norm=k_norm, rope=rope, backend=self.backend)
            else:
                out = time_attention(qkv, q_norm=q_norm, k_norm=k_norm, rope=rope)
            return self.proj(out.flatten(3))

        return layout.along_time(x, along_time)


class FullAttention(SelfAttention):
    """Attention among all tokens of a sample."""

    def _moved_by(self, _layout: TokenLayout) -> bool:
        return False  # queries, keys and values travel

    def forward(
        self, x: Float[Tensor, "B T S D"], layout: TokenLayout, rows: Float8Rows | None = None
    ) -> Float[Tensor, "B T S D"]:
        qkv = self.qkv(with_rows(x, rows)).view(*x.shape[:3], 3, self.num_heads, -1)
        return self.proj(layout.along_all(qkv, self.attend).reshape(x.shape))


class CrossAttention(nn.Module):
    """Attention from the tokens of a sample to its own valid caption tokens."""

    def __init__(self, config: ModelConfig, backend: AttentionBackend | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.backend = backend
        self.q_linear = Linear(width, width)
        self.kv_linear = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "B T S D"],
        y: Float[Tensor, "B L D"],
        keys: KeyMask | None,
        rows: Float8Rows | None = None,
    ) -> Float[Tensor, "B T S D"]:
        (B, T, S, _), L = x.shape, y.shape[1]
        q = self.q_linear(with_rows(x, rows)).view(B, T * S, self.num_heads, -1)
        kv = self.kv_linear(y).view(B, L, 2, self.num_heads, -1)
        return self.proj(caption_attention(q, kv, keys, backend=self.backend).reshape(x.shape))
