"""A small S3 for the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.s3 import MotoS3, S3Server, s3_environment
from tests.shared.stores.proxy import Proxy, running_proxy


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with MotoS3() as server:
        yield server


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server; what is opened from now on goes through it."""
    with running_proxy(s3_server.endpoint) as running:
        for name, value in s3_environment(running.endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        yield running
