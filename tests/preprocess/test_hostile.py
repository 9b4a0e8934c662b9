"""Files as strangers send them, through a whole job: each is encoded right or in the ledger; memory is bounded."""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from examples.ray_head import RayHead
from shared.cache.dataset import Cache
from shared.cache.reader import StreamReader
from tests.preprocess.conftest import ROOT
from tests.preprocess.hostile_files import NUM_CUTS, NUM_FLIPS, make_all

_MOST_DECODER_BYTES = 2 << 30
"""Of one decoding process: four frames of 7000x7000 pixels pass through it, one frame at a time."""


class PeakMemory:
    """Looks at the processes below one, but for the encoding actors, until it is closed."""

    def __init__(self, process_id: int) -> None:
        self.num_bytes = 0
        """The most that one of them ever had."""
        self._root, self._is_over = psutil.Process(process_id), threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(0.3):
            for process in self._root.children(recursive=True):
                try:
                    name = " ".join(process.cmdline())
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except (psutil.Error, OSError):
                    continue
                if name.startswith("ray::") and "_Worker" not in name:
                    peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
                    self.num_bytes = max(self.num_bytes, int(peak.split()[1]) * 1024)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hostile_set_is_encoded_right_or_in_the_ledger_and_memory_stays_bounded(
    ray_head: RayHead, clips_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cache_folder = tmp_path / "files", tmp_path / "cache"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        expected = make_all(folder, clips_folder, server.getsockname()[1])
        names = sorted({path.name for path in folder.iterdir()} | {"missing.mp4"})
        rows = [json.dumps({"path": name, "text": f"A caption of {name!r}."}) for name in names]
        (folder / "m.jsonl").write_text("\n".join(rows) + "\n")
        command = ["--preset", "demo", "--manifest", folder / "m.jsonl", "--output", cache_folder]
        command += ["--buckets", "4x64x64", "--posterior", "mean", "--decode-timeout", 120]
        started = time.monotonic()
        with PeakMemory(ray_head.process_id) as peak:
            job = subprocess.run(
                [sys.executable, "-m", "preprocess", *map(str, command)],
                cwd=ROOT,
                env=ray_head.environment,
                capture_output=True,
                text=True,
                check=False,
            )
        seconds = time.monotonic() - started
        with pytest.raises(TimeoutError):
            server.accept()  # nobody came
    assert job.returncode == 0, job.stderr
    assert len(names) > NUM_CUTS + NUM_FLIPS + 15
    cache = Cache.open(cache_folder)
    encoded = {row["source"]: row for row in cache.read_index().to_pylist()}
    refused = {row["source"]: row["reason"] for row in cache.read_ledger().to_pylist()}
    assert sorted(encoded.keys() | refused.keys()) == names
    assert not encoded.keys() & refused.keys()
    found = {name: refused.get(name) for name in expected}
    assert found == expected
    reader = StreamReader(cache.store)
    latents = {name: reader.latent(row["latent"]).float().numpy() for name, row in encoded.items()}
    assert all(np.isfinite(latent).all() for latent in latents.values())
    for name in ("new\nline.mp4", "wrong.txt", "wrong.webm"):
        assert np.array_equal(latents[name], latents["good.mp4"]), name
    likeness = np.corrcoef(latents["8k.mp4"].ravel(), latents["small.mp4"].ravel())[0, 1]
    assert likeness > 0.97
    assert refused.keys() - expected.keys() <= {name for name in names if name.startswith(("cut", "flip", "pixels"))}
    assert 0 < peak.num_bytes < _MOST_DECODER_BYTES
    with capsys.disabled():
        print(
            f"\n{len(names)} files: {len(encoded)} encoded, {len(refused)} refused, {seconds:.0f} s, "
            f"at most {peak.num_bytes / 1e6:.0f} MB a decoding process, likeness of 8K {likeness:.3f}"
        )
