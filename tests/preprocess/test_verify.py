"""``python -m preprocess.verify``."""

import re
import shutil
from pathlib import Path

import numpy as np

from tests.preprocess.conftest import Command


def test_a_sound_cache_passes_and_its_latents_decode_to_their_clips(demo_cache: Path, verify: Command) -> None:
    result = verify(demo_cache, "--decode", 12)
    assert result.returncode == 0, result.stderr
    assert "12 samples in 6 shards: counts, sizes and checksums as the index says" in result.stdout
    assert "1 refused in the ledger, 1 not_a_video" in result.stdout
    found = [float(value) for value in re.findall(r"against the clip: ([\d.]+) dB", result.stdout)]
    assert len(found) == 12
    assert min(found) > 20
    assert np.mean(found) > 26


def test_a_fault_is_named_and_gives_exit_code_1(demo_cache: Path, verify: Command, tmp_path: Path) -> None:
    cache = shutil.copytree(demo_cache, tmp_path / "cache")
    shard = sorted(cache.glob("shards/*/*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[2000] ^= 4
    shard.write_bytes(data)
    result = verify(cache)
    assert result.returncode == 1
    assert re.search(rf"FAULT  shards/.*{shard.name}: SHA-256", result.stdout)


def test_clips_that_have_gone_are_said_not_to_be_compared(demo_cache: Path, verify: Command, tmp_path: Path) -> None:
    result = verify(demo_cache, "--decode", 1, "--clips", tmp_path)
    assert result.returncode == 0
    assert "decodes to video; not compared: missing: no file" in result.stdout


def test_what_is_no_cache_is_refused_in_one_line(verify: Command, tmp_path: Path) -> None:
    result = verify(tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
