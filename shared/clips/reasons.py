"""The reasons for which clips are refused, as far as they last: ``--retry-refused`` takes them. Pure.

Others need no retrying: what the user mends (a missing file, a row of the manifest) and what fills no bucket is looked
at by every run, and what passes by itself is in no ledger.
"""

from collections.abc import Iterable, Mapping

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


def untaken_note(retried: Iterable[str], refused: Mapping[str, int]) -> str | None:
    """Returns a note for people if nothing is refused for some of the reasons that are to be tried again.

    It is no error: a job that took up all of them is run again, too.

    Args:
        retried: See :func:`check_retried`.
        refused: How many refusals there are, by reason.
    """
    untaken = [reason for reason in dict.fromkeys(retried) if not refused.get(reason)]
    if not untaken:
        return None
    there = ", ".join(f"{reason} ({refused[reason]:,})" for reason in sorted(RETRYABLE & refused.keys()))
    return (
        f"note: --retry-refused {' '.join(untaken)}: nothing is refused for {'it' if len(untaken) == 1 else 'them'}; "
        f"what could be taken up: {there or 'nothing'}"
    )
