"""The floating-point operations of a model, counted from its configuration: the numerator of every MFU.

A multiplication and an addition are two operations. Only products count (linear layers, convolution, attention), and
recomputation by activation checkpointing does not.

Letters: T frames, S tokens of a frame, L caption tokens, D width.
"""

from dataclasses import dataclass

from train.model.config import DiTConfig, ModelConfig, STDiT3Config, STDiTConfig
from train.model.layers import TimestepEmbedder


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFlop:
    """The operations of one forward pass for one sample, by part."""

    space: float
    """Products q k^T and p v of attention within frames."""
    time: float
    """Likewise along time."""
    full: float
    """Likewise among all tokens."""
    caption: float
    """Likewise to the caption."""
    linear: float
    """Linear layers and the convolution."""

    @property
    def attention(self) -> float:
        """All attention."""
        return self.space + self.time + self.full + self.caption

    @property
    def total(self) -> float:
        """All operations."""
        return self.attention + self.linear


def forward_flop(config: ModelConfig, *, num_frames: int, frame_tokens: int, caption_tokens: float) -> ForwardFlop:
    """Returns the operations of one forward pass for one sample.

    Args:
        config: The model.
        num_frames: Tokens along time, T.
        frame_tokens: Tokens of one frame, S.
        caption_tokens: Valid caption tokens, L; a mean is fine, as the count is linear in it. Labels have none.
    """
    D, T, S, L = config.hidden_size, num_frames, frame_tokens, caption_tokens
    tokens, depth = T * S, config.depth
    pair = 4 * tokens * D * depth  # q k^T and p v for one key a query, in all blocks
    self_attention, mlp = 2 * tokens * 4 * D * D, 2 * tokens * 2 * D * config.mlp_size
    cross_attention = 2 * tokens * 2 * D * D + 2 * L * 2 * D * D  # query and projection; keys and values
    condition = 2 * (TimestepEmbedder.sinusoid_size * D + D * D)
    single = condition + 2 * 6 * D * D + 2 * L * (config.caption_channels * D + D * D)  # modulation; caption
    space = time = full = caption = 0.0
    match config:
        case STDiTConfig():
            space, time, caption = pair * S, pair * T, pair * L
            linear = depth * (2 * self_attention + cross_attention + mlp) + single
        case STDiT3Config():
            space, time, caption = pair * S, pair * T, 2 * pair * L
            linear = 2 * depth * (self_attention + cross_attention + mlp) + single + condition
        case DiTConfig(num_classes=None):
            full, caption = pair * tokens, pair * L
            linear = depth * (self_attention + cross_attention + mlp) + single
        case DiTConfig():
            full = pair * tokens
            linear = depth * (self_attention + mlp + 2 * 6 * D * D) + condition + 2 * 2 * D * D
        case _:
            raise AssertionError(f"{type(config).__name__} is no model's configuration")
    patch_volume = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    linear += 2 * tokens * D * (patch_volume * config.in_channels + config.patch_values)
    return ForwardFlop(space=space, time=time, full=full, caption=caption, linear=linear)


def training_flop(config: ModelConfig, *, num_frames: int, frame_tokens: int, caption_tokens: float) -> float:
    """Returns the operations of a training step for one sample: forward, and twice that backward."""
    counted = forward_flop(config, num_frames=num_frames, frame_tokens=frame_tokens, caption_tokens=caption_tokens)
    return 3 * counted.total
