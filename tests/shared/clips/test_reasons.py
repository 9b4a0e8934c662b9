"""Reasons of refusals that can be taken up again."""

import re
from pathlib import Path

import pytest

from shared.clips.probes import PASSING_REASONS
from shared.clips.reasons import RETRYABLE, check_retried, untaken_note
from shared.errors import InputError

ROOT = Path(__file__).parents[3]
_RAISED = re.compile(r'MediaError\(\s*"([a-z_]+)"[^)]*\)', re.DOTALL)
_OF_MANIFESTS = {"bad_text", "truncated_tar"}


def test_every_lasting_reason_that_media_are_refused_for_is_known() -> None:
    files = [path for path in (ROOT / "shared/media").rglob("*.py") if "manifest" not in path.parts]
    raised = {
        match[1] for path in files for match in _RAISED.finditer(path.read_text()) if "transient=True" not in match[0]
    }
    assert {"not_a_video", "too_large", "truncated"} <= raised
    assert raised - PASSING_REASONS - _OF_MANIFESTS - {"probe_outdated", "not_reachable"} <= RETRYABLE


def test_every_reason_stands_in_the_description_of_the_format() -> None:
    text = (ROOT / "docs/cache_format.md").read_text()
    assert [reason for reason in sorted(RETRYABLE) if f"`{reason}`" not in text] == []


@pytest.mark.parametrize("reason", ["not_decodeable", "too_short", "no_caption", "missing", ""])
def test_a_reason_without_effect_is_refused_and_the_known_ones_are_named(reason: str) -> None:
    with pytest.raises(InputError, match=f"--retry-refused {reason}: no reason .* decode_timeout, .* not_decodable"):
        check_retried(["kills_workers", reason])
    check_retried(["kills_workers", "not_decodable"])


def test_a_reason_that_nothing_is_refused_for_is_told_with_those_that_there_are() -> None:
    refused = {"truncated": 1200, "not_a_video": 1, "too_short": 5}
    assert untaken_note([], refused) is None
    assert untaken_note(["truncated"], refused) is None
    assert untaken_note(["truncated", "kills_workers"], refused) == (
        "note: --retry-refused kills_workers: nothing is refused for it; what could be taken up: not_a_video (1), "
        "truncated (1,200)"
    )
    told = untaken_note(["no_frames", "truncated"], {})
    assert told == (
        "note: --retry-refused no_frames truncated: nothing is refused for them; what could be taken up: nothing"
    )
