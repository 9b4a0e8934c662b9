# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""What all models have in common: latents to tokens and back, and who they are told by where tokens lie.

Letters: B batch, C channels, T frames, S tokens of a frame, D width, V values of a patch.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.model.attention import AttentionBackend
from train.model.blocks import Block
from train.model.checkpointing import ActivationCheckpointing, Recomputation, require_checkpointing
from train.model.config import ModelConfig
from train.model.layers import PatchEmbedding, TimestepEmbedder, unpatchify
from train.model.layout import LayoutFor, whole_layout
from train.model.published_layout import adapt_published_state


class DiffusionTransformer(nn.Module):
    """Predicts what was done to latents from what they are, the timestep and a condition.

    Args:
        config: The architecture.
        attention_backend: The attention kernel; None chooses by device and shape.
        activation_checkpointing: What blocks keep for the backward pass.

    Attributes:
        layout_for: Where the tokens of a forward pass lie; set it to spread them over ranks.

    Raises:
        InputError: for an unknown way of checkpointing.
    """

    wants_size = False
    """Whether the forward pass takes ``fps``, ``height``, ``width`` and ``x_mask``."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention_backend: AttentionBackend | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__()
        require_checkpointing(activation_checkpointing)
        self.config = config
        self.attention_backend = attention_backend
        self.activation_checkpointing = activation_checkpointing
        self.layout_for: LayoutFor = whole_layout
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.register_load_state_dict_pre_hook(adapt_published_state)

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return self.x_embedder.proj.weight.dtype

    def transformer_blocks(self) -> list[Block]:
        """Returns the blocks in the order in which tokens go through them: what to compile, count or take apart."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def checkpoint_blocks(self, recomputation: Recomputation) -> None:
        """Decides what blocks compute again from here on.

        Raises:
            InputError: if it names more blocks than there are.
        """
        blocks = self.transformer_blocks()
        for block, mode in zip(blocks, recomputation.of_each(len(blocks)), strict=True):
            block.checkpointing = mode

    def grid_of(self, x: Float[Tensor, "B C T*pt H*ph W*pw"]) -> tuple[int, int, int]:
        """Returns the tokens along frames, rows and columns of latents."""
        return self.config.grid((x.shape[2], x.shape[3], x.shape[4]))

    def to_video(
        self, values: Float[Tensor, "B T S V"], x: Float[Tensor, "B C T*pt H*ph W*pw"]
    ) -> Float[Tensor, "B O T*pt H*ph W*pw"]:
        """Returns the tokens' values as videos of the size of x, in float32."""
        video = unpatchify(values, self.grid_of(x), self.config.patch_size)
        return video[:, :, : x.shape[2], : x.shape[3], : x.shape[4]].float()
