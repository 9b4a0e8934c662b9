"""The reasons for which clips are refused, as far as they last: ``--retry-refused`` takes them. Pure.

Others need no retrying: what the user mends (a missing file, a row of the manifest) and what fills no bucket is looked
at by every run, and what passes by itself is in no ledger.
"""

from collections.abc import Iterable

from shared.errors import InputError

OF_FILES = frozenset(
    {
        *("empty", "not_a_file", "bad_path", "truncated", "too_large", "too_long"),
        *("not_a_video", "no_video_stream", "no_frames", "no_frame_rate", "no_times"),
    }
)
"""Of files, as probing or decoding finds them."""
OF_DECODING = frozenset({"not_decodable", "frames_missing", "decoder_crashed", "decode_timeout"})
OF_ENCODING = frozenset({"kills_workers", "not_storable"})
RETRYABLE = OF_FILES | OF_DECODING | OF_ENCODING


def check_retried(reasons: Iterable[str]) -> None:
    """Raises :class:`InputError` if there is a reason for which nothing can be taken up again."""
    if unknown := [reason for reason in reasons if reason not in RETRYABLE]:
        raise InputError(
            f"--retry-refused {unknown[0]}: no reason for which clips stay refused: expected some of "
            f"{', '.join(sorted(RETRYABLE))}"
        )
