"""What is shown of texts that hold URLs."""

import pytest

from shared.errors import InputError, run_entry_point
from shared.redaction import without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/a.csv", "s3://bucket/a.csv"),
        ("s3://key:sec/ret+x@bucket/a.csv", "s3://bucket/a.csv"),
        ("https://secret@host:80/a", "https://host:80/a"),
        ("https://h/a.mp4?X-Amz-Signature=secret&b=1: HTTP 403", "https://h/a.mp4: HTTP 403"),
        ("GET 'https://h/a#secret' failed, then https://u:secret@h/b", "GET 'https://h/a' failed, then https://h/b"),
        ("http://host:9000/user@place/a.mp4", "http://host:9000/user@place/a.mp4"),
        ("s3://bucket/user@place/a.mp4: what?", "s3://bucket/user@place/a.mp4: what?"),
        ("what? a@b.c #1", "what? a@b.c #1"),
    ],
)
def test_urls_lose_user_password_query_and_fragment_and_nothing_else(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_the_line_of_an_input_error_has_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise InputError("s3://key:secret@bucket/a?token=secret: not found:\nname another")

    assert run_entry_point(main, debug=False) == 2
    assert capsys.readouterr().err == "error: s3://bucket/a: not found: name another\n"
