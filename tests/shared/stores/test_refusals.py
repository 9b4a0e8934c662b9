"""What is read out of an object store's refusals."""

import pytest

from shared.stores.refusals import Refusal, explain, may_pass, parse_refusal
from shared.stores.store import StoreFullError

ANSWER = """Generic S3 error: Error performing PUT http://127.0.0.1:4567/bucket/a in 3.4ms - Server returned non-2xx status code: {status}: <?xml version="1.0"?>
<Error><Code>{code}</Code><Message>Words of the store.</Message></Error>

Debug source:
Generic {{ status: 999, <Code>Other</Code> }}"""  # noqa: E501 - as the client gives it


def refusal_of(status: int, code: str) -> Refusal:
    return parse_refusal(ANSWER.format(status=status, code=code))


def test_status_and_code_are_the_answer_s_own() -> None:
    assert refusal_of(403, "AccessDenied") == Refusal(
        status=403, code="AccessDenied", summary="AccessDenied (Words of the store.)"
    )


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (502, "Any"),
        (429, "Any"),
        (409, "Any"),
        (408, "Any"),
        (400, "RequestTimeout"),
        (404, "NoSuchUpload"),
    ],
)
def test_what_may_pass_is_tried_again(status: int, code: str) -> None:
    assert may_pass(refusal_of(status, code))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (404, "NoSuchBucket"),
        (400, "InvalidRequest"),
        (501, "NotImplemented"),
        (503, "XMinioStorageFull"),
    ],
)
def test_what_stays_is_not(status: int, code: str) -> None:
    assert not may_pass(refusal_of(status, code))


def test_a_lost_connection_may_pass_and_has_no_status() -> None:
    refusal = parse_refusal(
        "Generic S3 error: Error performing GET http://x in 3 ms - HTTP error: error sending request"
    )
    assert refusal.status is None
    assert may_pass(refusal)


def test_a_quota_is_a_full_store_and_every_text_is_one_line() -> None:
    error = explain(refusal_of(403, "QuotaExceeded"), url="s3://b", doing="writing a", after_seconds=1)
    assert isinstance(error, StoreFullError)
    assert "\n" not in str(error)
