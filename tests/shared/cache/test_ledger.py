"""The ledger as people read it."""

import json

import pytest

from shared.cache.dataset import Cache
from shared.cache.ledger import Refusal, ledger_lines, write_ledger
from shared.errors import InputError


def test_the_ledger_is_printed_a_line_a_refusal_whatever_names_hold(cache: Cache) -> None:
    first = Refusal(source="b\tb\n.mp4", reason="missing", detail="no file")
    short = Refusal(source="a.mp4", source_version="1", bucket="4x8x8", reason="too_short", detail="1 frame")
    write_ledger(cache.store, [short, first])
    write_ledger(cache.store, [first, Refusal(source="a.mp4", reason="missing", detail="no file")])
    ledger = cache.read_ledger()
    assert ledger_lines(ledger) == [
        "missing\ta.mp4\tno file",
        "missing\tb b .mp4\tno file",
        "too_short\ta.mp4\t1 frame",
    ]
    assert ledger_lines(ledger, "too_short") == ["too_short\ta.mp4\t1 frame"]
    lines = [json.loads(line) for line in ledger_lines(ledger, as_json=True)]
    assert lines[1] == {"source": "b\tb\n.mp4", "reason": "missing", "detail": "no file"}
    assert lines[2]["bucket"] == "4x8x8"
    with pytest.raises(
        InputError, match="--reason gone: nothing is refused for it: expected one of missing, too_short"
    ):
        ledger_lines(ledger, "gone")


def test_a_cache_of_which_nothing_was_refused_has_no_lines(cache: Cache) -> None:
    assert ledger_lines(cache.read_ledger()) == ledger_lines(cache.read_ledger(), "missing") == []


def test_what_people_read_has_no_credentials(cache: Cache) -> None:
    source = "https://user:secret@host/a.mp4?X-Signature=key"
    write_ledger(cache.store, [Refusal(source=source, reason="missing", detail=f"{source}: 404")])
    (line,) = ledger_lines(cache.read_ledger())
    assert line == "missing\thttps://host/a.mp4\thttps://host/a.mp4: 404"
