"""The estimator: the published case, the bytes on disk, its speed and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.cache.commit import Sample, ShardWriter
from shared.cache.dataset import Cache
from shared.spec import Bucket
from storage_estimates.measure import bytes_on_disk, measure

KNOWN_CASE = ["--clips", "10_000_000", "--frames", "64", "--size", "512", "--tokens", "120"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line."""
    return subprocess.run(
        [sys.executable, "-m", "storage_estimates", *arguments], capture_output=True, text=True, check=False
    )


def test_the_published_case_is_printed() -> None:
    printed = run(*KNOWN_CASE).stdout
    assert "983,040" in printed
    assert "4,194,304" in printed
    assert "51.8 TB" in printed


def test_json_tells_what_bfloat16_and_unpadded_text_make_of_it() -> None:
    rows = json.loads(run(*KNOWN_CASE, "--json").stdout)
    assert [row["sample_bytes"] for row in rows[:3]] == [5_177_344, 3_080_192, 2_588_672]
    assert rows[0]["total_bytes"] == 51_773_440_000_000
    assert 0 < rows[3]["overhead_bytes"] < 5000


def test_it_imports_neither_torch_nor_pyarrow() -> None:
    code = (
        "import sys, storage_estimates.__main__ as m; sys.argv = ['x', '--clips', '5']; m.main();"
        "print(sorted({'torch', 'pyarrow', 'ray', 'transformers'} & sys.modules.keys()))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: expected one of --clips N and --cache FOLDER"),
        (["--clips", "0"], "error: --clips 0: expected at least 1"),
        (["--clips", "1", "--size", "big"], "error: --size 'big': expected a number of pixels or HEIGHTxWIDTH"),
        (["--clips", "1", "--size", "250"], "height=250 is not divisible by the VAE's spatial stride of 8"),
        (
            ["--clips", "1", "--mean-tokens", "200"],
            "--mean-tokens 200.0: expected more than 0 and at most --tokens 120",
        ),
        (["--cache", "/nowhere"], "error: /nowhere: found no such folder without dataset.json"),
    ],
)
def test_a_wrong_option_gives_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("bucket", "num_samples", "shard_samples", "num_tokens"),
    [
        (Bucket(16, 256, 256), 6, 6, 30),
        (Bucket(4, 64, 64), 300, 64, 20),
        (Bucket(8, 128, 256), 40, 16, 90),
    ],
)
def test_predicted_and_written_bytes_agree_within_two_percent(
    tmp_path: Path, codec: str, bucket: Bucket, num_samples: int, shard_samples: int, num_tokens: int
) -> None:
    provenance = {
        "latent": {"latent_channels": 8, "spatial_stride": 8, "temporal_stride": 1},
        "text.t5": {"text_channels": 64},
    }
    Cache.open_or_create(tmp_path, provenance)
    latent = torch.zeros(8, bucket.num_frames, bucket.height // 8, bucket.width // 8)
    for start in range(0, num_samples, shard_samples):
        with ShardWriter(
            tmp_path,
            shard_id=f"{start:032x}",
            bucket=bucket,
            codec=codec,
            clips_root=Path("clips"),
            environment={"device": "cpu", "torch": "2.13.0"},
        ) as writer:
            for number in range(start, min(start + shard_samples, num_samples)):
                # Captions, versions and statistics that do not compress better than real ones.
                generator = torch.Generator().manual_seed(number)
                letters = torch.randint(97, 123, (round(4.5 * num_tokens),), generator=generator).tolist()
                writer.add(
                    Sample(
                        sample=generator.get_state().numpy().tobytes()[64:80].hex(),
                        source=f"clips/{number:08d}.mp4",
                        source_version=f"{number * 977}-{latent.numel():x}",
                        bucket=bucket,
                        frame_interval=1,
                        fps=24.0,
                        captions=(bytes(letters).decode(),),
                        cleaned_captions=(str(number),),
                        latent=latent + torch.randn(8, 1, 1, 1, generator=generator),
                        texts=(torch.zeros(num_tokens, 64),),
                    )
                )
            writer.commit()
    predicted = sum(each.predicted_bytes() for each in measure(tmp_path))
    assert predicted == pytest.approx(bytes_on_disk(tmp_path), rel=0.02)
