"""Options that do not go together are refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from preprocess.config import PreprocessConfig
from shared.errors import InputError


def config(**options: Any) -> PreprocessConfig:
    """Returns a sound configuration but for these options."""
    return PreprocessConfig(
        **{"manifest": Path("m.csv"), "output": "/c", "buckets": ("16x256x256",), "preset": "demo"} | options
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": None}, "--vae is missing: expected a hub id or a folder"),
        ({"preset": None, "vae": "a/b"}, "--text-encoder is missing"),
        ({"preset": None, "vae": "demo:vae", "text_encoder": "a/b"}, "through --preset demo only"),
        ({"vae": "stabilityai/sd-vae-ft-ema"}, "--preset demo brings its own"),
        ({"buckets": ()}, "--buckets: found none"),
        ({"buckets": ("16x256",)}, "expected FRAMESxHEIGHTxWIDTH"),
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
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**options)


def test_the_demo_preset_brings_its_models_and_is_still_sound() -> None:
    resolved = config().resolved()
    assert (resolved.vae, resolved.text_encoder) == ("demo:vae", "demo:t5")


def test_without_a_preset_models_are_what_was_given() -> None:
    given = config(preset=None, vae="a/b", text_encoder="c/d")
    assert given.resolved() == given
