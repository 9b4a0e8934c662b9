"""Stores that the tests of this folder share."""

import secrets
from pathlib import Path

import pytest

from shared.stores.objects import ObjectStore
from shared.stores.open import open_store
from shared.stores.store import Store
from tests.s3 import S3Server
from tests.shared.stores.proxy import Proxy


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
