# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""The parts of which the diffusion transformers are made. The parameters' names are those of the published weights.

Letters: B batch, T frames, S tokens of a frame, L caption tokens, D width, H heads, P head width, V values of a patch,
G groups of frames that share a modulation (1 or T).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shared.errors import InputError
from train.model.attention import KeyMask
from train.model.config import DiTConfig, ModelConfig
from train.model.positions import timestep_sinusoid
from train.ops.float8 import Float8Rows, WithRows, empty_rows, with_rows
from train.ops.float8_linear import float8_linear, float8_linear_gelu
from train.ops.launching import would_launch_directly
from train.ops.linear import linear, linear_gelu
from train.ops.modulation import gate_add_norm_modulate, norm_modulate
from train.ops.parcels import Tokens

Stream = tuple[Float[Tensor, "B T S D"], Float[Tensor, "B T S D"] | None, Float[Tensor, "B G D"] | None]
"""The tokens, what is still to be added to them, and the gate of that; None if nothing is.

A block leaves its last addition to whatever comes next, where it is one pass with the norm.
"""


def enter(
    stream: Stream,
    shift: Float[Tensor, "B G D"],
    scale: Float[Tensor, "B G D"],
    rows: Float8Rows | None = None,
    *,
    parcels: int | None = None,
) -> tuple[Float[Tensor, "B T S D"], Tokens]:
    """Returns the tokens after what was left to be added, and their modulated norm: with ``rows`` in 8 bits too, with
    ``parcels`` in so many."""
    x, h, gate = stream
    if h is None:
        return x, norm_modulate(x, shift, scale, rows, parcels=parcels)
    return gate_add_norm_modulate(x, h, gate, shift, scale, rows, parcels=parcels)


class Linear(nn.Linear):
    """PyTorch's linear layer, on rows in two dimensions.

    For more dimensions, the linear function that DeepSpeed puts in PyTorch's place under ZeRO stage 3 adds the bias to
    the product in place. Selective checkpointing, which keeps the product, would add it twice.

    Attributes:
        float8: Whether the product is computed in 8 bits; see :mod:`train.model.float8`.
    """

    float8 = False

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "... I"] | WithRows, *, gelu: bool = False
    ) -> Float[Tensor, "... O"] | WithRows:
        """Returns the product with its bias, and with ``gelu`` the tanh-GELU of that: in 8 bits too, if that is how
        products are computed, for the layer that reads it."""
        if self.float8:
            return (float8_linear_gelu if gelu else float8_linear)(x, self.weight, self.bias)
        assert isinstance(x, Tensor)
        return (linear_gelu if gelu else linear)(x, self.weight, self.bias)


def rows_for(reader: nn.Module, x: Tokens) -> Float8Rows | None:
    """Returns room for as many tokens as x in 8 bits, for what writes them just before a layer reads them.

    It is None where the layer would not read it or converts by itself: without products in 8 bits, within what LoRA put
    around it, and where PyTorch must know of all operations. Tensors without content have it where they would on a GPU.
    """
    if not (isinstance(reader, Linear) and reader.float8 and would_launch_directly(x)):
        return None
    return empty_rows(x, x.numel() // x.shape[-1], x.shape[-1])


class Mlp(nn.Module):
    """Two linear layers with a tanh-GELU between them."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1: nn.Module = Linear(in_features, hidden_features)
        self.fc2: nn.Module = Linear(hidden_features, out_features)

    def forward(self, x: Float[Tensor, "... I"], rows: Float8Rows | None = None) -> Float[Tensor, "... O"]:
        """Returns the result; ``rows`` is x in 8 bits, from :func:`rows_for` of the first layer."""
        if isinstance(self.fc1, Linear):
            h = self.fc1(with_rows(x, rows), gelu=True)
            return self.fc2(h.x if isinstance(h, WithRows) and not isinstance(self.fc2, Linear) else h)
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # additions to its weight go before the GELU


class PatchProjection(nn.Conv3d):
    """A convolution whose stride is its kernel, as one product: its tokens lie one after the other in memory."""

    def forward(self, x: Float[Tensor, "B C T*pt H*ph W*pw"]) -> Float[Tensor, "B T S D"]:
        B, C, frames, rows, columns = x.shape
        pt, ph, pw = self.kernel_size
        patches = x.view(B, C, frames // pt, pt, rows // ph, ph, columns // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        values = patches.reshape(-1, C * pt * ph * pw)
        return F.linear(values, self.weight.flatten(1), self.bias).view(B, frames // pt, -1, self.out_channels)


class PatchEmbedding(nn.Module):
    """One token a patch. Latents are padded with zeros to whole patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = PatchProjection(
            config.in_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )

    def forward(self, x: Float[Tensor, "B C T*pt H*ph W*pw"]) -> Float[Tensor, "B T S D"]:
        missing = [-n % p for n, p in zip(x.shape[2:], self.patch_size, strict=True)]
        if any(missing):
            x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
        return self.proj(x.contiguous())


def unpatchify(
    x: Float[Tensor, "B T S V"], grid: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> Float[Tensor, "B O T*pt H*ph W*pw"]:
    """Returns the videos of tokens whose values are ordered (patch_t, patch_h, patch_w, O).

    Args:
        x: Tokens with the values of their patches.
        grid: Tokens along frames, rows and columns.
        patch_size: Latent frames, rows and columns of a token.
    """
    (t, h, w), (pt, ph, pw) = grid, patch_size
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], -1, t * pt, h * ph, w * pw)


class TimestepEmbedder(nn.Module):
    """The timestep's sinusoid through an MLP."""

    sinusoid_size = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(self.sinusoid_size, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))

    def forward(self, timestep: Float[Tensor, " B"], dtype: torch.dtype) -> Float[Tensor, "B D"]:
        return self.mlp(timestep_sinusoid(timestep, self.sinusoid_size).to(dtype))


class CaptionEmbedder(nn.Module):
    """Caption embeddings through an MLP; a dropped caption is replaced by the null caption, token by token."""

    y_embedding: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, width, length = config.caption_channels, config.hidden_size, config.model_max_length
        self.y_proj = Mlp(channels, width, width)
        self.register_buffer("y_embedding", torch.randn(length, channels) / channels**0.5)

    def forward(
        self,
        y: Float[Tensor, "B 1 L C"],
        mask: Int[Tensor, "B L"] | None,
        drop_caption: Bool[Tensor, " B"] | None,
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "B L D"], KeyMask | None]:
        """Returns the captions' tokens and which are valid; the valid ones come first.

        Raises:
            InputError: if the captions are too long.
        """
        y = y.squeeze(1).to(dtype)
        length = y.shape[1]
        if length > self.y_embedding.shape[0]:
            raise InputError(f"captions of {length} tokens, but model_max_length={self.y_embedding.shape[0]}: cut them")
        if drop_caption is not None:
            y = torch.where(drop_caption[:, None, None], self.y_embedding[:length].to(dtype), y)
        y = self.y_proj(y)
        if mask is None:
            return y, None
        keys, order = KeyMask.valid_first(mask)
        return y.gather(1, order[:, :, None].expand_as(y)), keys


class LabelEmbedder(nn.Module):
    """A vector for each class label, and, if labels are dropped in training, one more for none."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        assert config.num_classes is not None
        self.num_classes = config.num_classes
        self.embedding_table = nn.Embedding(self.num_classes + (config.class_dropout_prob > 0), config.hidden_size)

    def forward(self, labels: Int[Tensor, " B"], drop: Bool[Tensor, " B"] | None) -> Float[Tensor, "B D"]:
        """Returns the labels' vectors.

        Raises:
            InputError: if labels are to be dropped and there is no vector for that.
        """
        if drop is not None:
            if self.embedding_table.num_embeddings == self.num_classes:
                raise InputError("class_dropout_prob=0: the model has no null label: use no guidance")
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    """A modulated norm and the projection to the values of a patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = Linear(width, config.patch_values)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, stream: Stream, t: Float[Tensor, "B G D"]) -> Float[Tensor, "B T S V"]:
        """Returns the values of each token's patch.

        Args:
            stream: From the last block.
            t: The timestep's embedding.
        """
        shift, scale = (self.scale_shift_table + t[:, :, None]).unbind(2)
        _, h = enter(stream, shift, scale)
        return self.linear(h)
