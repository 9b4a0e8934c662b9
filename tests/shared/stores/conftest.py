"""Stores that the tests of this folder share."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.stores.objects import ObjectStore
from shared.stores.open import open_store
from shared.stores.store import Store
from tests.s3 import MotoS3, S3Server, s3_environment
from tests.shared.stores.proxy import Proxy, running_proxy


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with MotoS3() as server:
        yield server


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server; stores that are opened from now on go through it."""
    with running_proxy(s3_server.endpoint) as running:
        for name, value in s3_environment(running.endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        yield running


@pytest.fixture
def s3_url(s3_server: S3Server, request: pytest.FixtureRequest) -> str:
    """A prefix of the test's own in the bucket."""
    return f"{s3_server.url}/{request.node.originalname}-{secrets.token_hex(4)}"


@pytest.fixture
def s3_store(proxy: Proxy, s3_url: str) -> ObjectStore:
    return ObjectStore(s3_url, retry_seconds=30)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "s3":
        return request.getfixturevalue("s3_store")
    return open_store(tmp_path / "root")
