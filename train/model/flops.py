"""The floating-point operations of a model, counted from its configuration: the numerator of every MFU.

A multiplication and an addition are two operations. Only products count (linear layers, convolution, attention), and
recomputation by activation checkpointing does not.
"""

from train.model.config import STDiTConfig
from train.model.layers import TimestepEmbedder


def stdit_forward_flop(config: STDiTConfig, *, num_frames: int, frame_tokens: int, caption_tokens: float) -> float:
    """Returns the operations of one forward pass for one sample.

    Args:
        config: The model.
        num_frames: Tokens along time, T.
        frame_tokens: Tokens of one frame, S.
        caption_tokens: Valid caption tokens, L; a mean is fine, as the count is linear in it.
    """
    D, tokens = config.hidden_size, num_frames * frame_tokens
    patch_volume = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    self_attention = 2 * 4 * D * D  # space and time: q, k, v, projection
    caption_query = 2 * D * D  # query, projection
    mlp = 2 * D * config.mlp_size
    per_token = 2 * (self_attention + caption_query + mlp) + 4 * D * (frame_tokens + num_frames + caption_tokens)
    per_caption_token = 2 * 2 * D * D  # keys and values
    block = tokens * per_token + caption_tokens * per_caption_token
    patches = 2 * tokens * D * patch_volume * (config.in_channels + config.out_channels)
    caption = 2 * caption_tokens * (config.caption_channels * D + D * D)
    timestep = 2 * (TimestepEmbedder.sinusoid_size * D + D * D + 6 * D * D)
    return config.depth * block + patches + caption + timestep


def stdit_training_flop(config: STDiTConfig, *, num_frames: int, frame_tokens: int, caption_tokens: float) -> float:
    """Returns the operations of a training step for one sample: forward, and twice that backward."""
    return 3 * stdit_forward_flop(
        config, num_frames=num_frames, frame_tokens=frame_tokens, caption_tokens=caption_tokens
    )
