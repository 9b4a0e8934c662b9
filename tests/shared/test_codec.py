"""Codecs by name."""

import pytest

from shared.codec import Codec, raw_bytes, stored_dtype, stored_shape
from shared.errors import InputError

NAMES = [
    "float32",
    "bfloat16",
    "float16+zstd",
    "bfloat16+delta+zstd",
    "int8@37",
    "int8@36.5+zstd",
    "int8@10+delta+zstd",
    "int8@60",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_is_written_as_it_was_read(name: str) -> None:
    assert str(Codec.parse(name)) == name


def test_a_name_says_each_property() -> None:
    assert Codec.parse("int8@36.5+delta+zstd") == Codec(values="int8", sqnr_db=36.5, delta=True, zstd=True)
    assert Codec.parse("bfloat16") == Codec(values="bfloat16")
    assert Codec.parse("int8@37.0") == Codec.parse("int8@37")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"codec '': expected VALUES\[@DB\]\[\+delta\]\[\+zstd\], e.g. bfloat16"),
        ("float64", "with float32, bfloat16, float16, int8 for VALUES"),
        ("bfloat16+zstd+delta", "expected VALUES"),
        ("bfloat16+gzip", "expected VALUES"),
        ("BFLOAT16", "expected VALUES"),
        ("int8", "codec int8 does not say how fine its steps are: .* e.g. int8@38 for latents, int8@30 for text"),
        ("int8@", "expected VALUES"),
        ("int8@-3", "expected VALUES"),
        ("int8@nan", "expected VALUES"),
        ("int8@9.9", "codec int8@9.9: expected 10 to 60 dB after the @"),
        ("int8@61", "codec int8@61.0: expected 10 to 60 dB after the @"),
        ("int8@37.123", "expected VALUES"),
        ("bfloat16@37", "codec bfloat16@37: only int8 takes @DB, write bfloat16"),
        ("int8@37+delta", r"differences alone save nothing, write int8@37\+delta\+zstd or leave \+delta out"),
    ],
)
def test_a_name_that_says_no_codec_is_refused_with_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Codec.parse(name)


def test_a_codec_made_by_hand_is_checked_as_one_that_was_read() -> None:
    with pytest.raises(InputError, match="two decimals"):
        Codec(values="int8", sqnr_db=37.123)
    with pytest.raises(InputError, match="not known"):
        Codec(values="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "stored", "dtype", "num_bytes"),
    [
        ("float32", (4, 3, 2, 5), (4, 3, 2, 5), "float32", 480),
        ("bfloat16", (7, 16), (7, 16), "uint16", 224),
        ("float16", (7, 16), (7, 16), "float16", 224),
        ("bfloat16+zstd", (4, 3, 2, 5), (2, 4, 3, 2, 5), "uint8", 240),
        ("float32+zstd", (7, 16), (4, 7, 16), "uint8", 448),
        ("int8@37", (4, 3, 2, 5), (4, 31), "int8", 124),
        ("int8@37+delta+zstd", (4, 3, 2, 5), (4, 32), "int8", 128),
        ("int8@30+zstd", (7, 16), (8, 16), "int8", 128),
        ("int8@30", (0, 16), (1, 16), "int8", 16),
    ],
)
def test_the_stored_array_follows_from_codec_and_shape(
    name: str, shape: tuple[int, ...], stored: tuple[int, ...], dtype: str, num_bytes: int
) -> None:
    codec = Codec.parse(name)
    assert (stored_shape(codec, shape), stored_dtype(codec), raw_bytes(codec, shape)) == (stored, dtype, num_bytes)


def test_differences_of_a_text_are_refused() -> None:
    with pytest.raises(InputError, match=r"text of shape \(7, 16\) has no frames, write the codec without \+delta"):
        stored_shape(Codec.parse("int8@30+delta+zstd"), (7, 16))


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3), (-1, 4)])
def test_a_shape_that_is_neither_a_latent_nor_a_text_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \(C, T, H, W\) or \(L, D\)"):
        raw_bytes(Codec.parse("bfloat16"), shape)
