"""T5's encoder over captions that lie one after another, so that nothing is ever padded.

All but attention looks at each token by itself: norms and products run over the tokens of all captions of a batch at
once, and attention knows where each caption begins and ends. No shape is compiled for: a batch may have any number of
tokens. Computes what transformers' ``T5EncoderModel`` does, over its weights.

T tokens of a batch, N captions, L tokens of the longest, H heads, D width of a head, W width of the model.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5EncoderModel

from shared.encoders.t5_products import Products, why_pytorchs

FEED_FORWARDS = ("gated-gelu", "relu")
"""``feed_forward_proj`` of configurations that are known: T5 v1.1 and mT5, and the first T5."""

TILE = 64
"""Most tokens that attention looks at together."""

PRECISIONS = (torch.float32, torch.bfloat16)

GATED_COLUMNS, GATED_DEPTH = 128, 64
"""What of the inner and of the model's width the kernel of the product with the gated GELU takes at a time."""

GATED_TOKENS = 1024
"""Fewest tokens that it is used for. With T5-XXL's 10,240 inner columns these are 640 tiles, 97 % of five rounds of 132
multiprocessors; of fewer rounds, the last may stand idle for more than the GELU saves, and cuBLAS has smaller tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """The tokens of some captions, one caption after another."""

    lengths: tuple[int, ...]
    """Tokens of each caption."""
    ids: Tensor
    """(T,), int32."""
    starts: Tensor
    """(T,), int32: where each token's caption begins."""
    ends: Tensor
    """(T,), int32: where it ends."""
    tiles: Tensor
    """Borders of tiles, int32: each of whole captions, or an equal part of one that has more tokens than a tile."""


def pack(captions: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """Lays captions of token ids one after another on a device, without waiting for it."""
    lengths = np.array([len(caption) for caption in captions], np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    parts = [
        np.concatenate([np.asarray(caption, np.int32) for caption in captions]),
        np.repeat(ends - lengths, lengths),
        np.repeat(ends, lengths),
        np.array(tile_borders(lengths.tolist()), np.int32),
    ]
    together = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    ids, starts, stops, tiles = together.split([len(part) for part in parts])
    return Packed(lengths=tuple(lengths.tolist()), ids=ids, starts=starts, ends=stops, tiles=tiles)


def tile_borders(lengths: Sequence[int]) -> list[int]:
    """Returns where tiles begin and, last, where they end; see :class:`Packed`."""
    borders, at = [0], 0
    for length in lengths:
        if at > borders[-1] and at + length - borders[-1] > TILE:
            borders.append(at)
        parts = -(-length // TILE)
        borders += [at + length * part // parts for part in range(1, parts)]
        at += length
        if parts > 1:
            borders.append(at)
    return borders if borders[-1] == at else [*borders, at]


def why_not(model: T5EncoderModel) -> str | None:
    """Returns why transformers' own forward is needed for a model, or None if :class:`FastT5` computes it."""
    config = model.config
    if config.feed_forward_proj not in FEED_FORWARDS:
        return f"feed_forward_proj {config.feed_forward_proj!r} is not one of {', '.join(FEED_FORWARDS)}"
    if model.dtype not in PRECISIONS:
        return f"{model.dtype} is not one of {', '.join(map(str, PRECISIONS))}"
    return None


def why_apart(config: Any, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Returns why the inner product and the GELU behind it are two kernels, or None if they can be one.

    Args:
        config: Of the model.
        dtype: Of its weights.
        capability: CUDA's, of the GPU; None where Triton does not run.
    """
    if capability != (9, 0):
        return f"compute capability {capability} is not (9, 0)"
    if dtype != torch.bfloat16:
        return f"{dtype} is not torch.bfloat16"
    if config.dense_act_fn != "gelu_new" or not config.is_gated_act:
        return f"feed_forward_proj {config.feed_forward_proj!r} is not gated-gelu"
    if config.d_ff % GATED_COLUMNS or config.d_model % GATED_DEPTH:
        return f"d_ff {config.d_ff} or d_model {config.d_model} is no multiple of {GATED_COLUMNS} or {GATED_DEPTH}"
    return None


class FastT5:
    """The forward pass of a T5 encoder, on the device and in the type of its weights.

    Args:
        model: With weights in place; those that are multiplied together become views of one tensor.
        max_tokens: Of a caption.
        fuse_gelu: Whether the gated GELU is computed inside the product before it, where :func:`why_apart` knows of no
            obstacle, for batches of :data:`GATED_TOKENS` tokens or more.
        choose_products: Whether large products of T5-XXL take another algorithm than PyTorch's, where
            :func:`~shared.encoders.t5_products.why_pytorchs` knows of no obstacle.
    """

    def __init__(
        self, model: T5EncoderModel, *, max_tokens: int, fuse_gelu: bool = True, choose_products: bool = True
    ) -> None:
        assert why_not(model) is None
        config = model.config
        encoder: Any = model.encoder
        self._heads, self._epsilon, self._is_gated = config.num_heads, config.layer_norm_epsilon, config.is_gated_act
        self._embeddings, self._last_norm = encoder.embed_tokens.weight, encoder.final_layer_norm.weight
        self._layers = [_Layer.of(block) for block in encoder.block]
        self._bias = _bias_by_distance(encoder.block[0].layer[0].SelfAttention, max_tokens)
        self._max_tokens = max_tokens
        self.uses_triton = model.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        if self.uses_triton:
            from shared.encoders.t5_kernels import bias_in_vectors  # imports triton

            self._bias = bias_in_vectors(self._bias, model.dtype)
        capability = torch.cuda.get_device_capability(model.device) if self.uses_triton else None
        self.fuses_gelu = fuse_gelu and why_apart(config, model.dtype, capability) is None
        self.chooses_products = choose_products and why_pytorchs(config, model.dtype, capability) is None
        self._products = Products(chosen=self.chooses_products)
        self._gated: Any = None
        if self.fuses_gelu:
            from shared.encoders.gated_product_kernels import GatedWeights  # imports triton, as t5_kernels does

            programs = torch.cuda.get_device_properties(model.device).multi_processor_count
            self._gated = GatedWeights([layer.wi for layer in self._layers], programs=programs)

    def __call__(self, batch: Packed) -> Tensor:
        """Returns the last hidden states (T, W)."""
        step = _TritonSteps(batch, self._bias, self._max_tokens) if self.uses_triton else _TorchSteps(batch, self._bias)
        hidden = F.embedding(batch.ids, self._embeddings)
        tokens = len(hidden)
        gated = self._gated.of_pass(tokens) if self._gated is not None and tokens >= GATED_TOKENS else None
        for place, layer in enumerate(self._layers):
            normed = step.rms_norm(hidden, layer.attention_norm, self._epsilon)
            qkv = self._products.multiply(normed, layer.qkv)
            attended = step.attention(qkv.view(tokens, 3, self._heads, -1))
            self._products.add(hidden, attended, layer.out)
            if gated is not None:
                inner = gated(place, hidden, layer.feed_forward_norm, self._epsilon)
            else:
                inner = step.rms_norm(hidden, layer.feed_forward_norm, self._epsilon) @ layer.wi.t()
                inner = step.gated_gelu(inner) if self._is_gated else inner.relu_()
            self._products.add(hidden, inner, layer.wo)
        return step.rms_norm(hidden, self._last_norm, self._epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """The weights of a layer, (outputs, inputs)."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    feed_forward_norm: Tensor
    wi: Tensor
    wo: Tensor

    @classmethod
    def of(cls, block: Any) -> "_Layer":
        attention, feed_forward = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        is_gated = hasattr(feed_forward, "wi_0")
        return cls(
            attention_norm=block.layer[0].layer_norm.weight,
            qkv=_join([attention.q, attention.k, attention.v]),
            out=attention.o.weight,
            feed_forward_norm=block.layer[1].layer_norm.weight,
            wi=_join([feed_forward.wi_0, feed_forward.wi_1]) if is_gated else feed_forward.wi.weight,
            wo=feed_forward.wo.weight,
        )


def _join(linears: Sequence[nn.Linear]) -> Tensor:
    """Returns the weights of layers one below another; theirs become parts of it, so that memory holds them once."""
    joined = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, joined.split([linear.out_features for linear in linears]), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return joined


def _bias_by_distance(attention: Any, max_tokens: int) -> Tensor:
    """Returns what is added to scores (H, 2 max_tokens - 1), float32, by ``key - query + max_tokens - 1``."""
    distances = torch.arange(1 - max_tokens, max_tokens)
    buckets = attention._relative_position_bucket(
        distances,
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    weight = attention.relative_attention_bias.weight.detach()
    return weight[buckets.to(weight.device)].t().float().contiguous()


class _TorchSteps:
    """What lies between the products, in plain torch."""

    def __init__(self, batch: Packed, bias: Tensor) -> None:
        longest = max(batch.lengths)
        reach = (bias.shape[1] + 1) // 2
        at = torch.arange(longest, device=bias.device)
        by_position = bias[:, at - at[:, None] + reach - 1]  # (H, L, L)
        self._mask = by_position[None]
        self._places: Tensor | None = None
        if min(batch.lengths) < longest:
            lengths = torch.tensor(batch.lengths, device=bias.device)
            begins = lengths.cumsum(0) - lengths
            is_token = at < lengths[:, None]  # (N, L)
            self._places = torch.where(is_token, begins[:, None] + at, begins[:, None])
            self._is_token = is_token
            self._mask = by_position.where(is_token[:, None, None], float("-inf"))  # (N, H, L, L)
        self._longest = longest

    def rms_norm(self, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return F.rms_norm(hidden.float(), (hidden.shape[1],), weight.float(), epsilon).to(hidden.dtype)

    def gated_gelu(self, inner: Tensor) -> Tensor:
        gate, linear = inner.chunk(2, dim=1)
        return F.gelu(gate, approximate="tanh") * linear

    def attention(self, qkv: Tensor) -> Tensor:
        padded = qkv.unflatten(0, (-1, self._longest)) if self._places is None else qkv[self._places]
        q, k, v = (part.transpose(1, 2) for part in padded.unbind(2))  # (N, H, L, D)
        mask = self._mask.to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).flatten(2)
        return attended.flatten(0, 1) if self._places is None else attended[self._is_token]


class _TritonSteps:
    """What lies between the products, a kernel each."""

    def __init__(self, batch: Packed, bias: Tensor, reach: int) -> None:
        from shared.encoders import t5_kernels  # imports triton, which is there with CUDA only

        self._batch, self._bias, self._reach, self._kernels = batch, bias, reach, t5_kernels
        self.rms_norm, self.gated_gelu = t5_kernels.rms_norm, t5_kernels.gated_gelu

    def attention(self, qkv: Tensor) -> Tensor:
        batch = self._batch
        return self._kernels.attention(qkv, batch.starts, batch.ends, batch.tiles, self._bias, self._reach)
