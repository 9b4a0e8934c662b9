"""Options that do not go together are refused in one line."""

from dataclasses import replace
from typing import Any

import pytest

from preprocess.config import PreprocessConfig
from shared.errors import InputError


def config(**options: Any) -> PreprocessConfig:
    """Returns a sound configuration but for these options."""
    return PreprocessConfig(
        **{"manifest": "m.csv", "output": "/c", "buckets": ("16x256x256",), "preset": "demo"} | options
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": None}, "--vae is missing: expected a hub id or a folder"),
        ({"preset": None, "vae": "a/b"}, "--text-encoder is missing"),
        ({"vae": "stabilityai/sd-vae-ft-ema"}, "--preset demo brings its own"),
        ({"preset": None, "vae": "demo:vea", "text_encoder": "a/b"}, "--vae demo:vea: expected demo:vae, a hub id"),
        ({"preset": None, "vae": "a/b", "text_encoder": "demo:vae"}, "--text-encoder demo:vae: expected demo:t5"),
        ({"buckets": ()}, "--buckets: found none"),
        ({"buckets": ("16by256",)}, "expected FRAMESxHEIGHTxWIDTH"),
        ({"columns": ("video",)}, "expected THEIRS=OURS"),
        ({"columns": ("video=film",)}, "OURS one of path, text"),
        ({"workers": 0}, "--workers 0: expected at least 1"),
        ({"frame_interval": 0}, "--frame-interval 0: expected at least 1"),
        ({"shard_samples": 0}, "--shard-samples 0: expected at least 1"),
        ({"latent_codec": "int8"}, "write the aimed signal to noise ratio"),
        ({"latent_codec": "jpeg"}, "codec 'jpeg': expected VALUES"),
        ({"text_codec": "int8@30+delta+zstd"}, "has no frames"),
        ({"text_stream": "latent"}, "stream 'latent': expected text.NAME"),
        ({"only_texts": True, "prune": True}, "drop one of the two"),
        ({"fps": 0.0}, "--fps 0.0: expected a positive number"),
        ({"fps": 8.0, "frame_interval": 2}, "--fps with --frame-interval"),
        ({"windows_per_clip": 0}, "--windows-per-clip 0: expected at least 1"),
        ({"decode_timeout": float("nan")}, "--decode-timeout nan: expected a positive number"),
        ({"gpus_per_worker": 2.0}, "a worker uses one GPU"),
        ({"text_gpus": -1}, "--text-gpus -1: expected at least 0"),
        ({"partition": "3/2"}, "--partition 3/2: expected I/N"),
        ({"partition": "1/2", "prune": True}, "--prune with --partition"),
        ({"only_texts": True, "flip": True}, "--flip with --only-texts"),
        ({"max_refused": "some"}, "--max-refused some: expected a number of clips or a part"),
        ({"buckets": ("16x999q",)}, "16x999q"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**options)


def test_the_demo_preset_brings_its_models_and_is_still_sound() -> None:
    resolved = config().resolved()
    assert (resolved.vae, resolved.text_encoder) == ("demo:vae", "demo:t5")
    by_name = config(preset=None, vae="demo:vae", text_encoder="demo:t5")
    assert replace(by_name.resolved(), preset="demo") == resolved


def test_without_a_preset_models_are_what_was_given() -> None:
    given = config(preset=None, vae="a/b", text_encoder="c/d")
    assert given.resolved() == given
