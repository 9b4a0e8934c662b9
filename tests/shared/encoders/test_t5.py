"""T5 over captions that lie one after another gives what plain transformers gives for each by itself."""

import contextlib
import copy
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from shared.encoders import t5
from shared.encoders.fast_t5 import TILE, FastT5, pack, tile_borders, why_not
from shared.encoders.t5 import TextEncoder

LENGTHS = (1, 2, 2, 5, 17, 31, 33, 64, 65, 90, 119, 120)
VOCABULARY = 300


def make_model(
    feed_forward: str = "gated-gelu", *, width: int = 48, heads: int = 3, head_width: int = 16
) -> T5EncoderModel:
    torch.manual_seed(0)
    model = T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=width,
            d_kv=head_width,
            num_heads=heads,
            num_layers=3,
            d_ff=2 * width,
            feed_forward_proj=feed_forward,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=40,
        )
    )
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(4.0)  # else attention is nearly uniform
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval().requires_grad_(False)


def make_captions(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, VOCABULARY, length).tolist() for length in lengths]


def one_by_one(model: T5EncoderModel, captions: Sequence[list[int]]) -> list[Tensor]:
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state[0] for ids in captions]


def make_encoder(model: T5EncoderModel, *, faster: bool = True) -> TextEncoder:
    return TextEncoder(model, None, name="test", weights="", max_tokens=120, cleaning="none", faster=faster)


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
def test_captions_behind_one_another_give_what_transformers_gives_for_each(feed_forward: str) -> None:
    model, captions = make_model(feed_forward), make_captions()
    expected = one_by_one(model, captions)
    encoder = make_encoder(model)
    assert encoder.forward == "torch"
    for found, reference in zip(encoder.embed(captions), expected, strict=True):
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)


def test_captions_padded_as_the_published_code_does_give_the_same() -> None:
    model, captions = make_model(), make_captions([1, 2, 2, 40, 119, 120])
    expected = one_by_one(model, captions)
    encoder = make_encoder(model, faster=False)
    assert encoder.forward == "padded"
    for found, reference in zip(encoder.embed(captions), expected, strict=True):
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)
    assert encoder.num_tokens == sum(map(len, captions))


def test_captions_of_equal_length_need_no_mask_and_give_the_same() -> None:
    model, captions = make_model(), make_captions([17] * 5)
    expected = one_by_one(model, captions)
    for found, reference in zip(make_encoder(model).embed(captions), expected, strict=True):
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)


def test_the_model_still_gives_the_same_and_its_weights_lie_in_memory_once() -> None:
    model, captions = make_model(), make_captions()
    before = one_by_one(model, captions)
    weights = copy.deepcopy(model.state_dict())
    fast = FastT5(model, max_tokens=120)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    for found, expected in zip(one_by_one(model, captions), before, strict=True):
        torch.testing.assert_close(found, expected)
    attention = model.encoder.block[1].layer[0].SelfAttention
    attention.v.weight[:] = 0
    assert not fast._layers[1].qkv[-len(attention.v.weight) :].any()


@pytest.mark.parametrize("feed_forward", ["gated-silu", "gelu"])
def test_what_is_unknown_is_named_and_left_to_transformers(feed_forward: str, caplog: pytest.LogCaptureFixture) -> None:
    model, captions = make_model(feed_forward), make_captions([2, 2, 3, 7])
    expected = one_by_one(model, captions)
    encoder = make_encoder(model)
    assert encoder.forward == "transformers"
    assert f"feed_forward_proj {feed_forward!r} is not one of gated-gelu, relu" in caplog.text
    for found, reference in zip(encoder.embed(captions), expected, strict=True):
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)


def test_half_precision_is_left_to_transformers() -> None:
    assert "torch.float16 is not one of" in str(why_not(make_model().half()))


def test_tiles_hold_whole_captions_or_equal_parts_of_a_long_one() -> None:
    assert tile_borders([120, 120]) == [0, 60, 120, 180, 240]
    assert tile_borders([1, 2, 61, 1]) == [0, 64, 65]
    assert tile_borders([64, 65, 3]) == [0, 64, 96, 129, 132]
    assert tile_borders([10]) == [0, 10]
    lengths = np.random.default_rng(0).integers(1, 300, 200).tolist()
    borders, ends = tile_borders(lengths), np.cumsum(lengths)
    assert borders[0] == 0
    assert borders[-1] == ends[-1]
    assert 0 < np.diff(borders).min() <= np.diff(borders).max() <= TILE
    assert set(ends[np.array(lengths) > TILE]) <= set(borders)


def test_equal_captions_are_encoded_once_and_order_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(t5.BATCH_TOKENS, "cpu", 20)
    encoder = TextEncoder.load("demo:t5")
    captions = ["a dog runs over a meadow", "two birds", "rain " * 30, "a", "two birds", "A DOG runs over a meadow"]
    first = encoder.encode(captions)
    count = encoder.num_tokens
    assert count == sum(map(len, first[:4]))
    assert torch.equal(first[1], first[4])
    again = encoder.encode(captions[::-1])
    assert all(torch.equal(one, other) for one, other in zip(first, again[::-1], strict=True))
    assert encoder.num_tokens == 2 * count
    assert encoder.encode([]) == []


def test_batches_hold_about_equally_many_tokens_and_the_time_of_each_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(t5.BATCH_TOKENS, "cpu", 200)
    encoder, captions = make_encoder(make_model()), make_captions([*range(1, 30), 100])
    sizes, seen = [], [0]

    @contextlib.contextmanager
    def measure() -> Iterator[None]:
        yield
        seen.append(encoder.num_tokens)

    encoder.measure = measure
    found = encoder.embed(captions)
    sizes = np.diff([*seen, encoder.num_tokens])[1:]
    assert [len(embedding) for embedding in found] == [len(ids) for ids in captions]
    assert sizes.sum() == sum(map(len, captions)) == 535
    assert len(sizes) == 3
    assert sizes.max() <= 200
    assert sizes.min() > 100


def test_when_memory_does_not_suffice_batches_are_halved_for_the_rest_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(t5.BATCH_TOKENS, "cpu", 400)
    encoder, captions = make_encoder(make_model()), make_captions([20] * 40)
    expected = encoder.embed(captions)
    assert not encoder.halved
    batch, sizes = encoder._batch, []

    def with_little_memory(some: Sequence[list[int]]) -> list[Tensor]:
        sizes.append(sum(map(len, some)))
        if len(sizes) > 1 and sizes[-1] > 150:
            raise torch.OutOfMemoryError
        return batch(some)

    monkeypatch.setattr(encoder, "_batch", with_little_memory)
    found = encoder.embed(captions)
    assert sizes == [400, 400, 200, 100, 100, 100, 100]
    assert encoder.halved
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    sizes.clear()
    assert len(encoder.embed(captions[:20])) == 20
    assert (sizes, encoder.halved) == ([400], False)


def test_a_caption_that_does_not_fit_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(make_model())

    def without_memory(some: Sequence[list[int]]) -> list[Tensor]:
        raise torch.OutOfMemoryError("as often as it is tried")

    monkeypatch.setattr(encoder, "_batch", without_memory)
    with pytest.raises(torch.OutOfMemoryError, match="as often"):
        encoder.embed(make_captions([5, 6, 7]))


@pytest.mark.gpu
@pytest.mark.parametrize(("feed_forward", "head_width"), [("gated-gelu", 64), ("relu", 24)])
def test_kernels_give_what_transformers_gives(feed_forward: str, head_width: int) -> None:
    captions = sorted(make_captions([*LENGTHS, *range(1, 121, 3)]), key=len)
    model = make_model(feed_forward, width=320, heads=5, head_width=head_width).cuda()
    expected = torch.cat(one_by_one(model, captions))
    fast = FastT5(model, max_tokens=120)
    assert fast.uses_triton
    torch.testing.assert_close(fast(pack(captions, model.device)), expected, atol=2e-5, rtol=2e-5)
    low = copy.deepcopy(model).to(torch.bfloat16)
    rounded = torch.cat(one_by_one(copy.deepcopy(low).float(), captions))
    eager = (torch.cat(one_by_one(low, captions)).float() - rounded).square().mean().sqrt()
    found = FastT5(low, max_tokens=120)(pack(captions, model.device)).float()
    assert (found - rounded).square().mean().sqrt() <= 1.5 * eager
    cosine = torch.cosine_similarity(found, rounded, dim=1)
    assert cosine.min() > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "longest"),
    [
        ([1], 1),
        ([2, 1, 2], 2),
        ([7, 8, 8], 8),
        ([64, 65], 65),
        ([1, 2, 61, 1, 120], 120),
        ([121], 121),
        ([300, 1], 300),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_each_caption_and_reads_its_own_bias(
    lengths: list[int], longest: int, dtype: torch.dtype
) -> None:
    from shared.encoders.t5_kernels import attention, bias_in_vectors

    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 24, device="cuda").to(dtype)
    bias = torch.randn(2, 2 * longest - 1, device="cuda").to(dtype).float()
    vectors = bias_in_vectors(bias, dtype)
    batch = pack([[1] * length for length in lengths], qkv.device)
    found = attention(qkv, batch.starts, batch.ends, batch.tiles, vectors, longest)
    around = torch.where(bias_in_vectors(torch.ones_like(bias), dtype) == 1, vectors, 1e4)
    assert torch.equal(attention(qkv, batch.starts, batch.ends, batch.tiles, around, longest), found)
    for part, own in zip(qkv.split(lengths), found.split(lengths), strict=True):
        q, k, v = part.double().transpose(0, 2).unbind(1)  # (H, L, D)
        at = torch.arange(len(part), device=qkv.device)
        scores = q @ k.mT + bias[:, at - at[:, None] + longest - 1]
        expected = (scores.softmax(2) @ v).transpose(0, 1).flatten(1)
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        assert (own - expected).norm() <= bound * expected.norm()


@pytest.mark.gpu
def test_encoding_does_not_wait_for_the_gpu_and_gives_the_same_bits_again() -> None:
    encoder = make_encoder(make_model(width=256, head_width=64).cuda().to(torch.bfloat16))
    captions = make_captions([7, 7, *LENGTHS[5:]])
    first = encoder.embed(captions)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = encoder.embed(captions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again[0].is_cuda
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
