"""A small S3 on this machine, for tests: moto's server in a process of its own, with one empty bucket."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import boto3
from botocore.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Server:
    """A running server."""

    endpoint: str
    """Such as ``http://127.0.0.1:4567``."""
    url: str
    """Of the bucket: ``s3://bucket``."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a process finds the server: for ``os.environ`` or a subprocess."""
        return s3_environment(self.endpoint)

    def client(self):
        """Returns boto3's client, which looks at the bucket by another way than the code under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(s3={"addressing_style": "path"}),
        )


def s3_environment(endpoint: str) -> dict[str, str]:
    """Returns the variables that lead to ``endpoint``, such as that of a proxy before the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def MotoS3(bucket: str = "bucket") -> Iterator[S3Server]:  # noqa: N802 - read as a thing, used as one
    """Starts a server, whose objects go with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "MOTO_PORT": str(port)}
    )
    try:
        _wait_for(port, process)
        server = S3Server(endpoint=f"http://127.0.0.1:{port}", url=f"s3://{bucket}")
        server.client().create_bucket(Bucket=bucket)
        yield server
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"moto's server did not start on port {port}: {process.poll()=}")
