"""From a URL and the environment to obstore's client."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from shared.errors import InputError

if TYPE_CHECKING:  # These exist for type checkers only.
    from obstore.store import ClientConfig, RetryConfig

Client = S3Store | GCSStore | AzureStore

_FOUND_BY_CLIENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
"""Variables with which the client finds credentials by itself. The rest of S3's ways are boto3's: the client would ask
for an instance's role for many minutes where there is none."""


def open_client(url: str, *, retry_seconds: float) -> Client:
    """Returns a client whose keys are relative to the URL's path; nothing is asked of the server.

    Args:
        retry_seconds: The client tries again for so long at most, and for some 10 s.

    Raises:
        InputError: The URL names no bucket, or no credentials are found.
    """
    parts = urlsplit(url)
    bucket, prefix = parts.netloc, parts.path.strip("/")
    if not bucket or parts.query or parts.fragment:
        raise InputError(f"{url} names no bucket and prefix: write {parts.scheme}://bucket/prefix")
    retry: RetryConfig = {
        "max_retries": 8,
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=3),
            "base": 2,
        },
        "retry_timeout": timedelta(seconds=retry_seconds),
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    client: ClientConfig = {
        "timeout": timedelta(minutes=10),
        "read_timeout": timedelta(seconds=60),
        "allow_http": endpoint.startswith("http://"),
    }
    try:
        if parts.scheme == "s3":
            return S3Store(bucket, prefix=prefix, client_options=client, retry_config=retry, **_s3_credentials(url))
        if parts.scheme == "gs":
            return GCSStore(bucket, prefix=prefix, client_options=client, retry_config=retry)
        assert parts.scheme == "az", url
        return AzureStore(bucket, prefix=prefix, client_options=client, retry_config=retry)
    except (BaseError, ValueError) as error:
        reason = " ".join(str(error).split("Debug source")[0].split())
        raise InputError(
            f"{url} cannot be opened: {reason}: check the URL and the variables of this provider"
        ) from error


def _s3_credentials(url: str) -> dict[str, Any]:
    if any(os.environ.get(name) for name in _FOUND_BY_CLIENT) and not os.environ.get("AWS_PROFILE"):
        return {}
    advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError:
        raise InputError(
            f"{url}: no credentials in the environment: {advice}, or pip install boto3 to use ~/.aws"
        ) from None
    try:
        provider = Boto3CredentialProvider(boto3.Session())
    except (BotoCoreError, ValueError) as error:
        found = (
            str(error)
            if isinstance(error, BotoCoreError)
            else "none in the environment, ~/.aws or this instance's role"
        )
        raise InputError(f"{url}: no credentials: {found}: {advice} or AWS_PROFILE") from None
    return {"credential_provider": provider}
