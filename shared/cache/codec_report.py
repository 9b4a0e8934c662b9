"""What codecs cost and lose on given latents and texts: ``python -m shared.cache.codec_report --latents FILE ...``.

Signal is the variance of a channel about its mean, so that a channel far from zero does not look better than it is.

Letters: C latent channels, T latent frames, H and W latent rows and columns, L caption tokens, D text channels.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file

from shared.cache.payload import decode_into, decoded_dtype, encode
from shared.codec import Codec
from shared.errors import InputError, run_entry_point
from shared.media.quality import psnr

LATENT_CODECS = (
    "bfloat16+zstd bfloat16+delta+zstd float16+zstd int8@37+zstd "
    "int8@40+delta+zstd int8@38+delta+zstd int8@37+delta+zstd int8@34+delta+zstd int8@30+delta+zstd"
)
TEXT_CODECS = "bfloat16+zstd float16+zstd int8@37+zstd int8@34+zstd int8@30+zstd int8@26+zstd"


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecRow:
    """What one codec does to some arrays."""

    codec: Codec
    bits_per_value: float
    """Payload bits over the values of all arrays."""
    sqnr_db: float
    """Signal to noise over all values of all arrays; infinite if they come back exactly."""
    worst_channel_sqnr_db: float
    """Of the channel of an array that has the lowest; channels that do not vary do not count."""
    worst_token_cosine: float | None
    """Of texts: the lowest cosine between a token and what comes back; None for latents."""
    encode_mb_per_second: float
    """On one thread, counted as bfloat16: 2 bytes a value whatever the codec."""
    decode_mb_per_second: float
    """Likewise: of bfloat16 delivered."""
    worst_psnr_change_db: float | None = None
    """PSNR of the decoded video to its clip, minus that of the video from the uncompressed latent; the lowest of all
    clips. None where no videos were given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Videos:
    """What decoded videos are judged by."""

    decode: Callable[[torch.Tensor], np.ndarray]
    """Turns a latent (C, T, H, W) into uint8 frames."""
    clips: Sequence[np.ndarray]
    """The frames that each latent was made of, as ``decode`` shapes them."""


def measure(
    arrays: Sequence[torch.Tensor], codecs: Sequence[Codec], *, videos: Videos | None = None, repeats: int = 3
) -> list[CodecRow]:
    """Returns a row for each codec.

    Args:
        arrays: Latents (C, T, H, W), or texts (L, D), as the encoder gives them.
        codecs: To try.
        videos: To judge latents by.
        repeats: How often each array is encoded and decoded; the fastest counts.

    Raises:
        InputError: if there are no values, or a codec does not take them.
    """
    if not sum(array.numel() for array in arrays):
        raise InputError("there is not one value to measure codecs on: expected latents or texts")
    plain = None
    if videos is not None:
        plain = [psnr(videos.decode(array), clip) for array, clip in zip(arrays, videos.clips, strict=True)]
    return [_row(arrays, codec, videos, plain, repeats) for codec in codecs]


def _row(
    arrays: Sequence[torch.Tensor], codec: Codec, videos: Videos | None, plain: list[float] | None, repeats: int
) -> CodecRow:
    num_values = sum(array.numel() for array in arrays)
    num_bytes, encode_seconds, decode_seconds = 0, 0.0, 0.0
    signal, noise, channel_ratios, cosines, psnr_changes = 0.0, 0.0, [math.inf], [], []
    for number, array in enumerate(arrays):
        if not array.numel():
            continue
        decoded = torch.empty(array.shape, dtype=decoded_dtype(codec))
        payload = encode(array, codec)
        num_bytes += len(payload)
        encode_seconds += _fastest(lambda array=array: encode(array, codec), repeats)  # type: ignore[misc]
        decode_seconds += _fastest(
            lambda payload=payload, decoded=decoded: decode_into(payload, codec, decoded),  # type: ignore[misc]
            repeats,
        )
        signals, noises = _powers(array, decoded)
        signal, noise = signal + float(signals.sum()), noise + float(noises.sum())
        channel_ratios += (signals / noises)[signals > 0].tolist()
        if array.ndim == 2:
            cosines.append(float(torch.cosine_similarity(array.double(), decoded.double(), dim=1).min()))
        if videos is not None and plain is not None:
            psnr_changes.append(psnr(videos.decode(decoded), videos.clips[number]) - plain[number])
    return CodecRow(
        codec=codec,
        bits_per_value=8 * num_bytes / num_values,
        sqnr_db=_db(signal / noise if noise else math.inf),
        worst_channel_sqnr_db=_db(min(channel_ratios)),
        worst_token_cosine=min(cosines, default=None),
        encode_mb_per_second=2 * num_values / 1e6 / encode_seconds,
        decode_mb_per_second=2 * num_values / 1e6 / decode_seconds,
        worst_psnr_change_db=min(psnr_changes, default=None),
    )


def _fastest(work: Callable[[], object], repeats: int) -> float:
    """Returns the seconds of this thread, without its waiting, that the fastest of ``repeats`` calls took."""
    seconds = math.inf
    for _ in range(repeats):
        start = time.thread_time()
        work()
        seconds = min(seconds, time.thread_time() - start)
    return seconds


def _powers(array: torch.Tensor, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns for each channel the sum of squares of the values about their mean, and that of the errors."""
    exact, found = array.double(), decoded.double()
    values = exact.flatten(1).T if array.ndim == 4 else exact  # (values, channels)
    errors = (found - exact).flatten(1).T if array.ndim == 4 else found - exact
    varies = values.amax(0) > values.amin(0)
    return (values - values.mean(0)).square().sum(0) * varies, errors.square().sum(0)


def _db(ratio: float) -> float:
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else math.copysign(math.inf, ratio - 0.5)


def table(rows: Sequence[CodecRow]) -> str:
    """Returns the rows as a Markdown table; columns that say nothing of these arrays are left out."""
    columns: list[tuple[str, Callable[[CodecRow], str]]] = [
        ("codec", lambda row: f"`{row.codec}`"),
        ("bits a value", lambda row: f"{row.bits_per_value:.2f}"),
        ("SQNR, dB", lambda row: _finite(row.sqnr_db)),
        ("worst channel, dB", lambda row: _finite(row.worst_channel_sqnr_db)),
        ("encode, MB/s", lambda row: f"{row.encode_mb_per_second:.0f}"),
        ("decode, MB/s", lambda row: f"{row.decode_mb_per_second:.0f}"),
    ]
    if all(row.worst_token_cosine is not None for row in rows):
        columns.append(("worst token's cosine", lambda row: f"{row.worst_token_cosine:.5f}"))
    if all(row.worst_psnr_change_db is not None for row in rows):
        columns.append(("video, dB", lambda row: f"{row.worst_psnr_change_db:+.3f}"))
    lines = [[name for name, _ in columns], ["---"] * len(columns)]
    lines += [[text(row) for _, text in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _finite(decibel: float) -> str:
    return f"{decibel:.1f}" if math.isfinite(decibel) else "exact"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Measure codecs on latents and texts that lie in safetensors files, on one thread, speeds in its own time."""

    latents: tuple[Path, ...] = ()
    """Files of latents, (C, T, H, W) or several in one tensor, (N, C, T, H, W)."""
    texts: tuple[Path, ...] = ()
    """Files of captions' embeddings, (L, D) or several in one tensor, (N, L, D)."""
    latent_codecs: str = LATENT_CODECS
    """Codecs to try on latents, apart by spaces."""
    text_codecs: str = TEXT_CODECS
    """Codecs to try on texts, apart by spaces."""
    debug: bool = False
    """Show the traceback of an error."""


def load_arrays(files: Sequence[Path], ndim: int) -> list[torch.Tensor]:
    """Returns all tensors of some safetensors files that have ``ndim`` axes; those of one more are taken apart.

    Raises:
        InputError: if a file cannot be read, or holds a tensor of another number of axes.
    """
    arrays: list[torch.Tensor] = []
    for file in files:
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: {error}: expected a safetensors file") from error
        for name, tensor in tensors.items():
            if tensor.ndim not in (ndim, ndim + 1) or not tensor.is_floating_point():
                raise InputError(
                    f"{file}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected floats of {ndim} axes, "
                    f"or {ndim + 1} for several"
                )
            arrays += [tensor] if tensor.ndim == ndim else tensor.unbind()
    return arrays


def main(config: ReportConfig) -> int:
    """Prints a table of latents and one of texts; returns the exit code."""
    if not config.latents and not config.texts:
        raise InputError("nothing to measure on: give --latents FILE ..., --texts FILE ..., or both")
    torch.set_num_threads(1)
    for files, ndim, codecs in ((config.latents, 4, config.latent_codecs), (config.texts, 2, config.text_codecs)):
        if files:
            print(
                table(measure(load_arrays(files, ndim), [Codec.parse(codec) for codec in codecs.split()])), end="\n\n"
            )
    return 0


if __name__ == "__main__":
    arguments = tyro.cli(ReportConfig, prog="python -m shared.cache.codec_report")
    sys.exit(run_entry_point(lambda: main(arguments), debug=arguments.debug))
