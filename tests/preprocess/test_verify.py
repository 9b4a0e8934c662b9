"""``python -m preprocess.verify``."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocess.decoded_pictures import picture
from preprocess.verify import VerifyConfig
from preprocess.verify import verify as verify_cache
from shared.cache.dataset import Cache
from shared.cache.reader import StreamReader
from shared.errors import InputError
from shared.media.quality import psnr
from tests.preprocess.conftest import Command, demo_options
from tests.s3 import MotoS3


def test_a_sound_cache_passes_and_its_latents_decode_to_their_clips(
    demo_cache: Path, verify: Command, tmp_path: Path
) -> None:
    result = verify(demo_cache, "--decode", 12, "--pictures", tmp_path / "pictures")
    assert result.returncode == 0, result.stderr
    assert re.search(r"12 samples in 6 shards; read all, 0\.\d MB, and the whole index", result.stdout)
    assert "1 refused in the ledger, 1 not_a_video" in result.stdout
    found = [float(value) for value in re.findall(r"against the clip: ([\d.]+) dB", result.stdout)]
    assert len(found) == 12
    assert min(found) > 20
    assert np.mean(found) > 26
    places = [Path(place) for place in re.findall(r"dB PSNR; (.+\.png)$", result.stdout, re.MULTILINE)]
    assert sorted(places) == sorted((tmp_path / "pictures").iterdir())
    for place, decibel in zip(places, found, strict=True):
        with Image.open(place) as opened:
            pixels = np.asarray(opened)
        height = (len(pixels) - 4) // 2
        assert psnr(pixels[:height], pixels[-height:]) == pytest.approx(decibel, abs=3)  # of some of the frames


def test_a_picture_has_frames_from_the_first_to_the_last_above_those_decoded() -> None:
    clip = np.arange(16, dtype=np.uint8)[:, None, None, None] * np.ones((1, 6, 5, 3), np.uint8)
    made = picture(clip + 100, clip)
    assert made.shape == (6 + 4 + 6, 8 * 5, 3)
    assert made[0, ::5, 0].tolist() == [0, 2, 4, 6, 9, 11, 13, 15]
    assert made[-1, ::5, 0].tolist() == [100, 102, 104, 106, 109, 111, 113, 115]
    assert (made[6:10] == 255).all()
    assert picture(clip[:1], None).shape == (6, 5, 3)


def test_a_fault_is_named_and_gives_exit_code_1(demo_cache: Path, verify: Command, tmp_path: Path) -> None:
    cache = shutil.copytree(demo_cache, tmp_path / "cache")
    shard = sorted(cache.glob("shards/*/*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[2000] ^= 4
    shard.write_bytes(data)
    result = verify(cache)
    assert result.returncode == 1
    assert re.search(rf"FAULT  shards/.*{shard.name}: SHA-256", result.stdout)
    assert "--repair drops what is broken" in result.stdout


def test_what_is_repaired_is_encoded_again_and_equals_what_was_there(
    demo_cache: Path, clips_folder: Path, preprocess: Command, verify: Command, tmp_path: Path
) -> None:
    cache = shutil.copytree(demo_cache, tmp_path / "cache")
    first, second, third = sorted(cache.glob("shards/*/*.tar"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:5000])
    fragment = cache / "index" / f"{third.name.partition('-')[0]}.parquet"
    fragment.write_bytes(fragment.read_bytes()[:-10])
    result = verify(cache, "--decode", 0, "--repair")
    assert result.returncode == 0, result.stdout
    for path in (first, second):
        assert re.search(rf"FAULT  shards/.*{path.name}: ", result.stdout)
        assert re.search(rf"REPAIR shards/.*{path.name}: 2 samples removed", result.stdout)
    assert f"REPAIR index/{fragment.name}: moved to broken/index/" in result.stdout
    result = verify(cache, "--decode", 0)
    assert result.returncode == 0
    assert "6 samples in 3 shards" in result.stdout
    result = preprocess(*demo_options(clips_folder, cache))
    assert result.returncode == 0, result.stderr
    result = verify(cache, "--decode", 0, "--deep", 2)
    assert result.returncode == 0, result.stdout
    assert "12 samples in 6 shards" in result.stdout
    assert "encoded again: " in result.stdout
    assert arrays(cache) == arrays(demo_cache)


def arrays(root: Path) -> dict[str, list[bytes]]:
    """Returns the payloads of each sample."""
    cache = Cache.open(root)
    reader = StreamReader(cache.store)
    return {
        row["sample"]: [reader.payload(place) for place in (row["latent"], *row["text.t5"]["captions"])]
        for row in cache.read_index().to_pylist()
    }


def test_a_part_of_the_shards_is_read_and_said_so(demo_cache: Path, verify: Command) -> None:
    result = verify(demo_cache, "--decode", 0, "--sample", "20%", "--seed", 3)
    assert result.returncode == 0
    assert "read 1 of the shards (--sample 20%, --seed 3)" in result.stdout
    result = verify(demo_cache, "--decode", 0, "--sample", "some")
    assert result.returncode == 2
    assert "expected a number of shards such as 20, or a part such as 1%" in result.stderr


def test_a_folder_of_clips_that_is_not_there_is_no_reason_to_compare_none(tmp_path: Path) -> None:
    for mistake, complaint in (
        ({"clips": "/nowhere"}, "--clips /nowhere: no such folder: expected the one from which"),
        ({"clips": f"file://{tmp_path}/none"}, "no such folder"),
        ({"clips": str(tmp_path), "decode": 0}, "--clips .* does nothing with --decode 0 and no --deep"),
    ):
        with pytest.raises(InputError, match=complaint):
            verify_cache(VerifyConfig(cache="/nowhere/cache", **mistake))
    with pytest.raises(InputError, match="found no dataset.json"):
        verify_cache(VerifyConfig(cache="/nowhere/cache", clips=str(tmp_path)))


def test_a_damaged_description_is_a_fault_and_is_not_repaired(
    demo_cache: Path, verify: Command, tmp_path: Path
) -> None:
    cache = shutil.copytree(demo_cache, tmp_path / "cache")
    (cache / "dataset.json").write_text("{")
    result = verify(cache, "--decode", 0)
    assert result.returncode == 1
    assert "FAULT  dataset.json: not the description of a cache" in result.stdout
    result = verify(cache, "--decode", 0, "--repair")
    assert result.returncode == 2
    assert "nothing is repaired" in result.stderr


def test_samples_encoded_again_equal_the_stored_ones(demo_cache: Path, verify: Command) -> None:
    result = verify(demo_cache, "--decode", 0, "--deep", 12)
    assert result.returncode == 0, result.stdout
    assert "encoded again: 26 equal" in result.stdout


def test_a_cache_on_s3_is_checked_and_repaired(
    demo_cache: Path, monkeypatch: pytest.MonkeyPatch, verify: Command
) -> None:
    with MotoS3() as server:
        for name, value in {**server.environment, "AWS_ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(name, value)
        for path in demo_cache.rglob("*"):
            if path.is_file():
                server.client().upload_file(str(path), "bucket", f"cache/{path.relative_to(demo_cache)}")
        assert verify(f"{server.url}/cache", "--decode", 0).returncode == 0
        shard = sorted(demo_cache.glob("shards/*/*.tar"))[0].relative_to(demo_cache)
        server.client().delete_object(Bucket="bucket", Key=f"cache/{shard}")
        result = verify(f"{server.url}/cache", "--decode", 0)
        assert result.returncode == 1
        assert f"FAULT  {shard}: the shard is missing" in result.stdout
        assert verify(f"{server.url}/cache", "--decode", 0, "--repair").returncode == 0
        assert verify(f"{server.url}/cache", "--decode", 0).returncode == 0


def test_clips_that_have_gone_are_said_not_to_be_compared(demo_cache: Path, verify: Command, tmp_path: Path) -> None:
    result = verify(demo_cache, "--decode", 1, "--clips", tmp_path)
    assert result.returncode == 0
    idle = verify(demo_cache, "--decode", 0, "--pictures", tmp_path)
    assert (idle.returncode, idle.stderr.count("\n")) == (2, 1)
    assert "does nothing with --decode 0" in idle.stderr
    assert "decodes to video; not compared: missing: no file" in result.stdout


def test_what_is_no_cache_is_refused_in_one_line(verify: Command, tmp_path: Path) -> None:
    result = verify(tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
