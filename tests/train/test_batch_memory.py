"""Buffers for batches: used again when nobody holds them, and only then."""

import pytest
import torch

from train.batch_memory import BatchShape, BufferPool

SHAPE = BatchShape(
    batch_size=2,
    latent_shape=(4, 1, 64, 64),
    caption_length=3,
    caption_channels=5,
    latent_dtype=torch.bfloat16,
    caption_dtype=torch.float32,
)


def test_a_buffer_is_taken_again_when_its_last_tensor_is_gone():
    pool = BufferPool(SHAPE.num_bytes, pin=False)
    first = pool.take()
    tensors = SHAPE.tensors(pool.lease(first))
    part = tensors.latents[1, 2:]
    del tensors
    assert pool.take() == 1
    del part
    assert pool.take() == first
    assert len(pool.buffers) == 2


def test_the_parts_of_a_batch_do_not_overlap():
    pool = BufferPool(SHAPE.num_bytes, pin=False)
    tensors = SHAPE.tensors(pool.lease(pool.take()))
    names = ("latents", "captions", "mask", "u", "noise_keys", "drop_caption")
    for value, name in enumerate(names):
        getattr(tensors, name).fill_(value)
    for value, name in enumerate(names):
        assert (getattr(tensors, name) == min(value, 1 if name == "drop_caption" else value)).all()
    assert tensors.captions.shape == (2, 3, 5)


@pytest.mark.gpu
def test_a_pinned_buffer_is_filled_again_only_after_the_copies_out_of_it():
    pool = BufferPool(SHAPE.num_bytes, pin=True)
    copies = []
    for step in range(200):
        number = pool.take()
        tensors = SHAPE.tensors(pool.lease(number))
        assert tensors.latents.is_pinned()
        tensors.latents.fill_(step)
        copies.append(tensors.latents.to("cuda", non_blocking=True))
        del tensors
    assert len(pool.buffers) < 5
    assert [float(copy.float().mean()) for copy in copies] == list(range(200))
    pool.close()
