"""Looking at nodes before a job."""

import subprocess
import sys
from pathlib import Path

from examples.ray_head import RayHead
from preprocess.preflight import Finding, PreflightConfig, differing, look
from tests.preprocess.conftest import ROOT


def test_a_cluster_is_looked_at_and_what_is_missing_is_named(ray_head: RayHead, tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "preprocess.preflight", "--output", str(tmp_path / "cache"), *options],
            cwd=ROOT,
            env=ray_head.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    found = run("--vae", "demo:vae", "--text-encoder", "/no/such/folder")
    assert found.returncode == 1, found.stderr
    assert "ok      VAE: demo:vae: AutoencoderKL" in found.stdout
    assert "MISSING text encoder: cannot be read" in found.stdout
    assert "no such folder: expected a folder or a hub id" in found.stdout
    assert f"ok      output: {tmp_path}/cache can be written and read" in found.stdout
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_output_that_cannot_be_written_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    findings = look(PreflightConfig(output=str(tmp_path / "file")), 0)
    (output,) = [finding for finding in findings if finding.what == "output"]
    assert output.missing is not None


def test_nodes_of_other_versions_are_named() -> None:
    nodes = {name: [Finding(what="versions", found=f"torch {name}")] for name in ("1", "2")}
    (finding,) = differing(nodes)
    assert "torch 1 | torch 2" in finding.found
    assert not differing({"a": nodes["1"], "b": nodes["1"]})
