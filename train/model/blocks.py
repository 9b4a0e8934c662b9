# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""What the blocks of all models have in common, and the block of STDiT3 and DiT.

Letters: B batch, T frames, S tokens of a frame, L caption tokens, D width, G groups of frames that share a modulation:
1 or T.
"""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.model.attention import AttentionBackend, KeyMask
from train.model.attention_layers import CrossAttention, Rope, SelfAttention
from train.model.checkpointing import ActivationCheckpointing, checkpointed
from train.model.config import ModelConfig
from train.model.layers import Mlp, Stream, enter, rows_for
from train.model.layout import TokenLayout
from train.ops.modulation import gate_add, gate_add_norm_modulate, gate_add_twice


class Block(nn.Module):
    """A block with its activation checkpointing, which lies inside, so that compiling a block takes it in.

    Args:
        checkpointing: What to keep for the backward pass. With ``attention`` and ``full``, nothing is left to the next
            block to add: then of its inputs only one tensor a block is kept.
    """

    def __init__(self, checkpointing: ActivationCheckpointing) -> None:
        super().__init__()
        self.checkpointing = checkpointing

    @abstractmethod
    def compute(self, stream: Stream, *context: Any) -> Stream:
        """Returns the stream after this block."""

    def forward(self, stream: Stream, *context: Any) -> Stream:
        """Returns the stream after this block.

        Args:
            stream: From the block before.
            context: What the block at hand takes besides.
        """
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(stream, *context)
        if self.checkpointing in ("attention", "full"):
            return checkpointed(self._compute_closed, self.checkpointing)(stream, *context), None, None
        result: Stream = checkpointed(self.compute, self.checkpointing)(stream, *context)
        return result

    def _compute_closed(self, stream: Stream, *context: Any) -> Tensor:
        x, h, gate = self.compute(stream, *context)
        assert h is not None
        assert gate is not None
        return gate_add(x, h, gate)


class TransformerBlock(Block):
    """Attention, caption, MLP: each added to the tokens, the first and the last modulated by the timestep.

    The modulation of all blocks comes from one product (adaLN-single, PixArt-alpha, arXiv 2310.00426), to which each
    adds a table of its own.

    Args:
        config: The model.
        attention: In space, along time, or among all.
        backend: The attention kernel.
        checkpointing: What to keep for the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: SelfAttention,
        backend: AttentionBackend | None,
        checkpointing: ActivationCheckpointing,
    ) -> None:
        super().__init__(checkpointing)
        width = config.hidden_size
        self.attn = attention
        self.cross_attn = CrossAttention(config, backend)
        self.mlp = Mlp(width, config.mlp_size, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def compute(
        self,
        stream: Stream,
        y: Float[Tensor, "B L D"],
        t: Float[Tensor, "B G 6*D"],
        keys: KeyMask | None,
        layout: TokenLayout,
        rope: Rope | None = None,
    ) -> Stream:
        """Returns the stream after this block.

        Args:
            stream: From the block before.
            y: Captions.
            t: The timestep's modulation.
            keys: Valid caption tokens.
            layout: Where the tokens lie.
            rope: Angles of the frames, for attention along time.
        """
        modulation = self.scale_shift_table + t.view(*t.shape[:2], 6, -1)  # (B, G, 6, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(2)
        rows = self.attn.rows_for(stream[0], layout)
        parcels = self.attn.parcels_for(stream[0], layout)
        x, h = enter(stream, shift_msa, scale_msa, rows, parcels=parcels)
        h = self.attn(h, layout, rows) if rope is None else self.attn(h, layout, rows, rope=rope)
        rows = rows_for(self.cross_attn.q_linear, x)
        x, h = gate_add_twice(x, h, gate_msa, rows)
        h = self.cross_attn(h, y, keys, rows)
        rows = rows_for(self.mlp.fc1, x)
        x, h = gate_add_norm_modulate(x, h, None, shift_mlp, scale_mlp, rows)
        return x, self.mlp(h, rows), gate_mlp
