"""Arrays as payloads and back."""

import contextlib
import functools
import inspect
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file

from shared.cache.payload import decode, decode_into, decoded_dtype, encode, stored_array
from shared.codec import Codec, raw_bytes, stored_dtype, stored_shape
from shared.encoders.t5 import TextEncoder
from shared.encoders.vae import VideoAutoencoder
from shared.errors import InputError
from tests.shared.cache.taef2 import read_clip

ROOT = Path(__file__).parents[3]
WAN_LATENT = Path(__file__).parents[4] / "shared/data/latents/wan21_bf16.safetensors"
CLIPS = ROOT / "tests" / "data" / "clips"

LOSSLESS = ["float32", "bfloat16", "float16"]
LATENT_CODECS = [
    *(name + tail for name in LOSSLESS for tail in ("", "+zstd", "+delta+zstd")),
    *(name + tail for name in ("int8@37", "int8@30") for tail in ("", "+zstd", "+delta+zstd")),
]
TEXT_CODECS = [name + tail for name in (*LOSSLESS, "int8@37", "int8@30") for tail in ("", "+zstd")]


def decode_payload(payload: bytes, codec: str, shape: tuple[int, ...]) -> np.ndarray:
    values, delta, zstd = re.split("[@+]", codec)[0], "+delta" in codec, "+zstd" in codec
    raw = zstandard.decompress(payload) if zstd else payload
    if values == "int8" and len(shape) == 2:
        stored = np.frombuffer(raw, "i1").reshape(-1, shape[1])
        return stored[1:] * np.exp2(stored[0] / 8.0).astype("f4")
    if values == "int8":
        stored = np.frombuffer(raw, "i1").reshape(shape[0], -1)
        quantised = stored[:, 2 if delta else 1 :].reshape(shape)
        for axis, bit in [(3, 2), (1, 1)] if delta else []:
            differs = (stored[:, 1] & bit > 0)[:, None, None, None]
            quantised = np.where(differs, np.cumsum(quantised, axis, "i1"), quantised)
        return quantised * np.exp2(stored[:, 0] / 8.0).astype("f4")[:, None, None, None]
    width = 4 if values == "float32" else 2
    bits = np.frombuffer(raw, f"<i{width}" if not zstd else "u1").reshape(-1, *shape)
    if zstd:
        zigzag = sum(bits[plane].astype(f"u{width}") << 8 * plane for plane in range(width))
        ordered = ((zigzag >> 1) ^ -(zigzag & 1)).view(f"i{width}")
        ordered = np.cumsum(ordered, 1, ordered.dtype) if delta else ordered
        bits = np.where(ordered < 0, ordered ^ np.iinfo(ordered.dtype).max, ordered)
    return ((bits.astype("u4") << 16).view("f4") if values == "bfloat16" else bits.view(values)).reshape(shape)


def random_latent(*shape: int, seed: int = 0) -> torch.Tensor:
    """Noise that moves slowly in time, with channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(shape, generator=generator)
    return steps.cumsum(1) * torch.logspace(-2, 2, shape[0]).reshape(-1, 1, 1, 1)


def random_text(num_tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Heavy tails (Student's t, 4 degrees of freedom), channels of unlike size, four of them 50 to 100 times larger."""
    torch.manual_seed(seed)
    text = torch.distributions.StudentT(torch.tensor(4.0)).sample((num_tokens, channels))
    text *= 0.2 * torch.rand(channels) + 0.02
    text[:, torch.randperm(channels)[:4]] = torch.randn(num_tokens, 4) * 0.12 * torch.tensor([50.0, 65, 80, 100])
    return text


@functools.cache
def demo_latents() -> list[torch.Tensor]:
    vae = VideoAutoencoder.load("demo:vae", micro_batch=4)
    return [vae.encode(read_clip(CLIPS / name, 8), seed="a") for name in ("towers_teal.mp4", "meadow.mpg")]


def bits_per_value(values: torch.Tensor, codec: str) -> float:
    return 8 * len(encode(values, Codec.parse(codec))) / values.numel()


def channel_sqnr_db(values: torch.Tensor, codec: str) -> torch.Tensor:
    """Signal to noise of each channel that varies, of (C, T, H, W) or (L, D)."""
    parsed = Codec.parse(codec)
    decoded = decode(encode(values, parsed), parsed, values.shape).double()
    exact = values.double()
    if values.ndim == 4:
        exact, decoded = exact.flatten(1).T, decoded.flatten(1).T
    return 10 * torch.log10(exact.var(0, correction=0) / (decoded - exact).square().mean(0))


# Every codec, every shape


@pytest.mark.parametrize("name", LATENT_CODECS)
@pytest.mark.parametrize(
    "shape", [(4, 5, 6, 7), (3, 1, 8, 8), (4, 3, 1, 1), (1, 1, 1, 1), (2, 0, 4, 4), (0, 2, 4, 4), (40, 4, 20, 20)]
)
def test_a_latent_comes_back_exactly_or_within_half_a_step(name: str, shape: tuple[int, ...]) -> None:
    values, codec = random_latent(*shape), Codec.parse(name)
    payload = encode(values, codec)
    decoded = decode(payload, codec, shape)
    assert decoded.dtype == decoded_dtype(codec)
    assert decoded.shape == shape
    if codec.values != "int8":
        assert torch.equal(decoded, values.to(decoded.dtype))
        return
    steps = 2.0 ** (torch.from_numpy(stored_array(payload, codec, shape)[:, 0].copy()) / 8)[:, None, None, None]
    # bfloat16 keeps 8 significant bits: rounding to it moves a value by up to 1/256 of itself.
    assert bool(((decoded - values).abs() <= 0.5001 * steps + (values.abs() + steps) / 256).all())


@pytest.mark.parametrize("name", TEXT_CODECS)
@pytest.mark.parametrize("shape", [(9, 32), (1, 32), (0, 32), (3, 1), (70, 4096)])
def test_a_text_comes_back_exactly_or_within_half_a_step(name: str, shape: tuple[int, int]) -> None:
    codec = Codec.parse(name)
    values = random_text(*shape) if shape[1] > 4 else torch.randn(shape)
    payload = encode(values, codec)
    decoded = decode(payload, codec, shape)
    assert decoded.shape == shape
    if codec.values != "int8":
        assert torch.equal(decoded, values.to(decoded.dtype))
        return
    steps = 2.0 ** (torch.from_numpy(stored_array(payload, codec, shape)[0].copy()) / 8)
    assert bool(((decoded - values).abs() <= 0.5001 * steps + (values.abs() + steps) / 256).all())


@pytest.mark.parametrize("name", LATENT_CODECS)
def test_stored_arrays_have_the_shape_and_type_that_the_codec_promises(name: str) -> None:
    values, codec = random_latent(4, 5, 6, 7), Codec.parse(name)
    payload = encode(values, codec)
    stored = stored_array(payload, codec, values.shape)
    assert stored.shape == stored_shape(codec, values.shape)
    assert stored.dtype.name == stored_dtype(codec)
    if codec.zstd:
        assert zstandard.decompress(payload) == stored.tobytes()
        assert zstandard.frame_content_size(payload) == raw_bytes(codec, values.shape)
    else:
        assert payload == stored.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", ["+zstd", "+delta+zstd"])
def test_every_finite_bit_pattern_survives_a_lossless_codec(dtype: torch.dtype, tail: str) -> None:
    if dtype == torch.float32:
        bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int()
    else:
        bits = torch.arange(-(2**15), 2**15).short()
    values = bits.view(dtype)
    values = torch.where(torch.isfinite(values), values, torch.tensor(-0.0, dtype=dtype)).reshape(4, 16, 32, 32)
    assert bool(torch.signbit(values[values == 0]).any())
    codec = Codec.parse(str(dtype).removeprefix("torch.") + tail)
    decoded = decode(encode(values, codec), codec, values.shape)
    assert torch.equal(decoded.view(bits.dtype), values.view(bits.dtype))


def test_equal_arrays_give_equal_bytes_whatever_their_memory_layout() -> None:
    values = random_latent(4, 5, 6, 8)
    turned = values.transpose(0, 3).contiguous().transpose(0, 3)
    for name in LATENT_CODECS:
        assert encode(values, Codec.parse(name)) == encode(turned, Codec.parse(name)), name


def test_an_array_is_decoded_into_its_place_in_a_batch() -> None:
    for name in LATENT_CODECS:
        codec = Codec.parse(name)
        batch = torch.zeros(3, 4, 5, 6, 8, dtype=decoded_dtype(codec))
        payload = encode(random_latent(4, 5, 6, 8), codec)
        decode_into(payload, codec, batch[1])
        assert torch.equal(batch[1], decode(payload, codec, (4, 5, 6, 8)))
        assert not batch[0].any()
        assert not batch[2].any()


def test_another_type_is_given_on_request() -> None:
    codec, values = Codec.parse("int8@37"), random_latent(4, 5, 6, 8)
    decoded = decode(encode(values, codec), codec, values.shape, dtype=torch.float32)
    assert torch.equal(decoded, decode(encode(values, codec), codec, values.shape).float())


# The page that defines them


def test_the_documented_decoder_is_the_one_that_is_tested_here() -> None:
    source = inspect.getsource(decode_payload)
    assert f"```python\n{source}```" in (ROOT / "docs" / "codecs.md").read_text()


@pytest.mark.parametrize("name", LATENT_CODECS)
def test_the_documented_decoder_decodes_every_latent(name: str) -> None:
    codec = Codec.parse(name)
    for values in (random_latent(4, 5, 6, 8), random_latent(3, 1, 8, 8), *demo_latents()[:1]):
        payload = encode(values, codec)
        documented = torch.from_numpy(decode_payload(payload, name, tuple(values.shape)).copy())
        assert torch.equal(documented.to(decoded_dtype(codec)), decode(payload, codec, values.shape))


@pytest.mark.parametrize("name", TEXT_CODECS)
def test_the_documented_decoder_decodes_every_text(name: str) -> None:
    codec, values = Codec.parse(name), random_text(20, 64)
    payload = encode(values, codec)
    documented = torch.from_numpy(decode_payload(payload, name, (20, 64)).copy())
    assert torch.equal(documented.to(decoded_dtype(codec)), decode(payload, codec, (20, 64)))


# What cannot be stored, what cannot be read


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LATENT_CODECS)
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    values = random_latent(2, 2, 2, 2)
    values[1, 1, 0, 1] = value
    with pytest.raises(InputError, match="not finite or out of range"):
        encode(values, Codec.parse(name))


@pytest.mark.parametrize(("name", "value"), [("float16", 70_000.0), ("int8@37", 1e8), ("bfloat16", 3.4e38)])
def test_what_is_out_of_range_is_refused(name: str, value: float) -> None:
    values = torch.tensor([[1.0, value], [1.0, 2.0]])
    with pytest.raises(InputError, match="not finite or out of range"):
        encode(values, Codec.parse(name))


@pytest.mark.parametrize("name", ["bfloat16", "int8@37"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_the_wrong_size_is_refused(name: str, change: int) -> None:
    codec = Codec.parse(name)
    payload = encode(random_latent(2, 2, 2, 2), codec) + b"\0"
    with pytest.raises(InputError, match=r"payload of \d+ bytes: .* of shape \(2, 2, 2, 2\) takes \d+"):
        decode(payload[: len(payload) - 1 + change], codec, (2, 2, 2, 2))


@pytest.mark.parametrize("name", ["bfloat16+zstd", "int8@37+zstd", "int8@37+delta+zstd"])
def test_a_frame_that_is_cut_or_followed_by_more_or_of_another_shape_is_refused(name: str) -> None:
    codec, values = Codec.parse(name), random_latent(2, 3, 8, 8)
    payload = encode(values, codec)
    cuts = [payload[:length] for length in range(0, len(payload), 7)]
    for damaged in (*cuts, payload + b"\0", payload + payload, payload[::-1], b"\0" * len(payload)):
        with pytest.raises(InputError, match="payload"):
            decode(damaged, codec, values.shape)
    with pytest.raises(InputError, match=r"payload says it holds \d+ bytes: .* of shape \(2, 3, 8, 4\) takes \d+"):
        decode(payload, codec, (2, 3, 8, 4))


@pytest.mark.parametrize("name", ["bfloat16+zstd", "bfloat16+delta+zstd", "int8@37+delta+zstd"])
def test_a_flipped_bit_gives_an_error_or_an_array_but_never_a_crash(name: str) -> None:
    codec, values = Codec.parse(name), random_latent(2, 3, 8, 8)
    payload = encode(values, codec)
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(InputError):
            assert decode(damaged, codec, values.shape).shape == values.shape


def test_a_frame_that_would_unpack_to_more_than_its_shape_takes_no_memory() -> None:
    codec, shape = Codec.parse("int8@37+zstd"), (4, 2, 8, 8)
    honest = zstandard.compress(bytes(2**28))
    size = zstandard.get_frame_parameters(honest).content_size.to_bytes(4, "little")
    lying = honest.replace(size, raw_bytes(codec, shape).to_bytes(4, "little"), 1)
    assert zstandard.frame_content_size(lying) == raw_bytes(codec, shape)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**28))
    tracemalloc.start()
    for bomb in (honest, lying, unsized):
        with pytest.raises(InputError, match="payload"):
            decode(bomb, codec, shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_differences_of_a_kind_that_does_not_exist_are_refused() -> None:
    codec, values = Codec.parse("int8@37+delta+zstd"), random_latent(2, 3, 4, 4)
    stored = stored_array(encode(values, codec), codec, values.shape).copy()
    stored[1, 1] = 4
    with pytest.raises(InputError, match="channel 1 has differences of kind 4, expected 0 to 3"):
        decode(zstandard.compress(stored.tobytes()), codec, values.shape)


# What int8 loses


def test_each_channel_meets_the_aim_on_average_and_lies_close_to_it() -> None:
    values = torch.randn(200, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -1.5, 1.5, 200
    ).reshape(-1, 1, 1, 1)
    for aim in (20, 25, 30, 35, 37):
        ratios = channel_sqnr_db(values, f"int8@{aim}")
        assert float(ratios.mean()) == pytest.approx(aim, abs=0.1)
        assert float((ratios - aim).abs().max()) < 0.85  # half a step of the grid is 0.38 dB, chance the rest


def test_nothing_is_clipped_however_far_a_value_lies_out() -> None:
    values = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    values[1, 2, 3, 4], values[2, 0, 0, 0] = 60.0, -4000.0
    for name in ("int8@37", "int8@60", "int8@37+delta+zstd"):
        decoded = decode(encode(values, Codec.parse(name)), Codec.parse(name), values.shape)
        assert float(decoded[1, 2, 3, 4]) == pytest.approx(60, rel=0.01)
        assert float(decoded[2, 0, 0, 0]) == pytest.approx(-4000, rel=0.01)


def test_channels_that_do_not_vary_keep_their_value() -> None:
    values = torch.tensor([0.0, 5.0, -0.001, 1000.0]).reshape(4, 1, 1, 1).expand(4, 3, 4, 4)
    for name in ("int8@37", "int8@37+zstd", "int8@37+delta+zstd"):
        decoded = decode(encode(values, Codec.parse(name)), Codec.parse(name), values.shape)
        assert torch.allclose(decoded.float(), values, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [20, 60, 120])
def test_texts_with_dominant_channels_keep_28_db_in_every_channel_at_6_bits(num_tokens: int) -> None:
    for seed in range(3):
        text, name = random_text(num_tokens, 4096, seed), "int8@30+zstd"
        decoded = decode(encode(text, Codec.parse(name)), Codec.parse(name), text.shape)
        assert bits_per_value(text, name) < 5.8
        assert float(channel_sqnr_db(text, name).min()) > 28
        assert float(torch.cosine_similarity(text, decoded.float(), dim=1).min()) > 0.999


def test_loud_channels_of_a_text_do_not_turn_its_tokens() -> None:
    text, name = random_text(60, 4096), "int8@30+zstd"
    loud = text.std(0) > 8 * text.std(0).median()
    assert int(loud.sum()) == 4
    ratios = channel_sqnr_db(text, name)
    assert float(ratios[loud].min()) > 40
    assert float(ratios[~loud].mean()) == pytest.approx(30, abs=0.2)


def test_real_t5_outputs_keep_28_db_in_every_channel_at_6_bits() -> None:
    encoder = TextEncoder.load("demo:t5")
    captions = [
        "A plump purple cartoon bird stands on a bare branch, lifts a foot and squawks with its orange beak wide open.",
        "Office towers at night seen from the street, lit in teal, while the camera tilts up slowly.",
    ]
    for text in encoder.encode([encoder.clean(caption) for caption in captions]):
        values, name = text.float().cpu(), "int8@30+zstd"
        decoded = decode(encode(values, Codec.parse(name)), Codec.parse(name), values.shape)
        assert bits_per_value(values, name) < 8 * (1 + 1 / len(values))
        assert float(channel_sqnr_db(values, name).min()) > 28
        assert float(torch.cosine_similarity(values, decoded.float(), dim=1).min()) > 0.999


def test_real_latents_shrink_by_entropy_coding_and_more_by_differences() -> None:
    for latent in demo_latents():
        plain, coded, different = (bits_per_value(latent, f"int8@37{tail}") for tail in ("", "+zstd", "+delta+zstd"))
        assert different < coded < 0.9 * plain
        assert bits_per_value(latent, "bfloat16+zstd") < 12
        assert 36.5 < float(channel_sqnr_db(latent, "int8@37+delta+zstd").mean()) < 37.5


@pytest.mark.skipif(not WAN_LATENT.exists(), reason=f"needs {WAN_LATENT}, which is not part of the repository")
def test_a_real_wan_latent_takes_few_bits() -> None:
    (latent,) = (tensor[0] for tensor in load_file(WAN_LATENT).values())
    assert bits_per_value(latent, "bfloat16+zstd") < 9.7
    assert bits_per_value(latent, "bfloat16+delta+zstd") < 8.6
    assert bits_per_value(latent, "int8@37+delta+zstd") < 3.5
    assert bits_per_value(latent[:, :1], "int8@37+delta+zstd") < 5.4
    assert float(channel_sqnr_db(latent, "int8@37+delta+zstd").mean()) == pytest.approx(37, abs=0.1)
