"""Hashes of weights: computed once a node, and again for files that changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.encoders import fingerprint
from shared.encoders.fingerprint import WeightFiles, known_weights_sha256, weights_sha256

VERSIONS = {"transformers": "1"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights, and an empty place for hashes."""
    monkeypatch.setenv("LATENTMILL_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(fingerprint, "_LEAST_BYTES", 10)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"1" * 100)
    return tmp_path / "model"


def hashed(module: torch.nn.Module, model: Path, monkeypatch: pytest.MonkeyPatch, **versions: str) -> tuple[str, int]:
    """Returns the hash, and how often it was computed."""
    calls = []

    def count(module: torch.nn.Module) -> str:
        calls.append(module)
        return weights_sha256(module)

    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "weights_sha256", count)
        found = known_weights_sha256(module, str(model), WeightFiles.of(str(model)), VERSIONS | versions)
    return found, len(calls)


def test_the_second_worker_of_a_node_hashes_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(3, 2)
    assert hashed(module, model, monkeypatch) == (weights_sha256(module), 1)
    assert hashed(module, model, monkeypatch) == (weights_sha256(module), 0)
    assert hashed(module, model, monkeypatch, transformers="2") == (weights_sha256(module), 1)


def test_files_that_changed_are_hashed_again_even_of_the_same_size_and_time(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    file = model / "model.safetensors"
    hashed(old, model, monkeypatch)
    stat = file.stat()
    with open(file, "r+b") as opened:
        opened.write(b"2")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert hashed(new, model, monkeypatch) == (weights_sha256(new), 1)


def test_files_that_change_while_they_are_loaded_leave_nothing_behind(model: Path) -> None:
    before = WeightFiles.of(str(model))
    (model / "model.safetensors").write_bytes(b"3" * 100)
    module = torch.nn.Linear(3, 2)
    assert known_weights_sha256(module, str(model), before, VERSIONS) == weights_sha256(module)
    assert not (model.parent / "kept").exists()


@pytest.mark.parametrize("content", ["", "no hash", "a" * 63])
def test_what_is_no_hash_is_not_believed(model: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    module = torch.nn.Linear(3, 2)
    hashed(module, model, monkeypatch)
    for path in (model.parent / "kept/weights").iterdir():
        path.write_text(content)
    assert hashed(module, model, monkeypatch) == (weights_sha256(module), 1)


def test_workers_that_load_at_the_same_time_hash_once(model: Path, tmp_path: Path) -> None:
    code = f"""
import time, torch
from shared.encoders import fingerprint
from shared.encoders.fingerprint import WeightFiles, known_weights_sha256
fingerprint._LEAST_BYTES = 10
def slow(module):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write("hashed\\n")
    time.sleep(2)
    return "a" * 64
fingerprint.weights_sha256 = slow
print(known_weights_sha256(torch.nn.Linear(1, 1), {str(model)!r}, WeightFiles.of({str(model)!r}), {{}}))
"""
    workers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [worker.communicate()[0].strip() for worker in workers] == ["a" * 64] * 2
    assert (tmp_path / "log").read_text() == "hashed\n"


def test_a_place_that_cannot_be_written_costs_only_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parent / "kept").write_text("a file")
    module = torch.nn.Linear(3, 2)
    assert hashed(module, model, monkeypatch) == (weights_sha256(module), 1)
