"""What an object store's refusals mean: what may pass, and what to tell the user of the rest. Pure."""

import re
from dataclasses import dataclass

from shared.stores.store import StoreBusyError, StoreError, StoreFullError

_PASSING_STATUS = {408, 409, 429}
_PASSING_CODES = {"RequestTimeout", "SlowDown", "NoSuchUpload", "OperationAborted", "ConditionalRequestConflict"}
"""NoSuchUpload: the answer to a completed upload was lost, and the part-wise upload is no more: it is made anew."""
_FULL_CODES = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage"}
_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct its name",
    "AccessDenied": "these credentials may not do that: they need to get, put, delete and list objects here",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY and AWS_REGION",
    "ExpiredToken": "renew the credentials",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "set AWS_REGION to the bucket's region",
    "NotImplemented": "this store cannot put an object only if it is absent, which a cache needs: choose another one",
}
_BAD_PLACE = "check the endpoint, the region (AWS_ENDPOINT_URL, AWS_REGION), the bucket and the credentials"


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """What the text of a client's error says."""

    status: int | None
    """HTTP's, or None if no answer came."""
    code: str | None
    """The store's own word, such as SlowDown."""
    summary: str
    """One short line."""


def parse_refusal(text: str) -> Refusal:
    """Returns what an error's text says of the answer; S3 and Azure answer in XML, Google in XML or JSON."""
    text = " ".join(text.split("Debug source")[0].split())
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    message = re.search(r"<Message>(.*?)</Message>", text)
    if "redirect without LOCATION" in text:  # The client keeps nothing of this answer.
        return Refusal(status=301, code="PermanentRedirect", summary="PermanentRedirect")
    if code is not None:
        summary = f"{code[1]} ({message[1]})" if message else code[1]
    else:
        summary = text if len(text) <= 300 else f"{text[:300]}..."
    return Refusal(status=int(status[1]) if status else None, code=code[1] if code else None, summary=summary)


def may_pass(refusal: Refusal) -> bool:
    """Returns whether the same request can succeed later."""
    if refusal.code in _PASSING_CODES:
        return True
    if refusal.code in _ADVICE or refusal.code in _FULL_CODES:
        return False
    return refusal.status is None or refusal.status >= 500 or refusal.status in _PASSING_STATUS


def explain(refusal: Refusal, *, url: str, doing: str, after_seconds: float) -> StoreError:
    """Returns what to tell the user.

    Args:
        url: The store's.
        doing: What was tried, such as ``writing index/ab.parquet``.
        after_seconds: How long it was tried.
    """
    if refusal.code in _FULL_CODES or refusal.status == 507:
        return StoreFullError(f"{url}: {refusal.summary} while {doing}: make room there or choose another place")
    if may_pass(refusal):
        return StoreBusyError(
            f"{url}: no success within {after_seconds:.0f} s while {doing}: {refusal.summary}: {_BAD_PLACE}, "
            "then run again: what is committed stays"
        )
    return StoreError(f"{url}: {refusal.summary} while {doing}: {_ADVICE.get(refusal.code or '', _BAD_PLACE)}")
