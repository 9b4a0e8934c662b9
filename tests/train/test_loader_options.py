"""The trainer's options for reading, and the benchmark of the loader."""

import json

import pytest

from shared.errors import InputError
from shared.spec import Bucket
from tests.train.synthetic_cache import write_cache
from train.benchmark.loader import main
from train.config import TrainConfig
from train.setup import check_run
from train.trainer import train

BUCKETS = {Bucket(2, 32, 32): 12, Bucket(3, 32, 48): 9}


@pytest.fixture
def config(small_config, tmp_path) -> TrainConfig:
    cache = write_cache(tmp_path / "c", BUCKETS, manifest={"aesthetic": [4.0, 6.0, 8.0]})
    return small_config.changed(cache=cache.url, local_cache=tmp_path / "local")


def test_a_batch_by_tokens_has_as_many_samples_as_fit(config, ranks):
    changed = config.changed(batch_size=8, batch_tokens=100, batch_multiple=2)
    plan = check_run(changed, ranks).plan
    assert {bucket: plan.batch_size(bucket) for bucket in plan.buckets} == {  # 2x2x2 and 3x2x3 tokens a sample
        Bucket(2, 32, 32): 12,
        Bucket(3, 32, 48): 4,
    }
    assert train(changed.changed(steps=3), ranks) == 0


def test_a_condition_and_a_holdout_leave_samples_out(config, ranks):
    assert check_run(config.changed(where="aesthetic > 5"), ranks).plan.num_samples == 14
    held = check_run(config.changed(holdout="30%", output=config.output / "b"), ranks).plan.num_samples
    assert 0 < held < 21


def test_a_run_that_skips_damaged_samples_says_how_many(config, ranks, tmp_path, capsys):
    (shard, *_) = sorted((tmp_path / "c" / "shards").rglob("*.tar"))
    shard.unlink()
    with pytest.raises(InputError, match="the shard is missing"):
        train(config.changed(buckets=("2x32x32", "3x32x48"), output=tmp_path / "stops"), ranks)
    write_cache(tmp_path / "c", {Bucket(2, 32, 32): 2}, seed=3, manifest={"aesthetic": [1.0]})
    assert train(config.changed(on_corrupt="skip", output=tmp_path / "skips", log_every=3), ranks) == 0
    assert (
        "samples could not be read: the next good one was taken instead; run preprocess.verify"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch_size": 4, "batch_tokens": 100}, "batch_size=4 and batch_tokens=100: give one of them"),
        ({"batch_multiple": 4}, "batch_multiple=4 does nothing without --batch-tokens"),
        ({"where": "fps >"}, "--where 'fps >': not an expression"),
        ({"holdout": "100%"}, "--holdout 100%: expected a part"),
        ({"local_cache_gb": 0.0}, "local_cache_gb=0.0: expected more than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint):
        TrainConfig.of(cache="c", output=tmp_path, **changes)


@pytest.mark.slow
def test_the_benchmark_measures_every_reader_cold_and_warm(tmp_path, capsys):
    options = ["--samples", "40", "--batch-size", "4", "--bucket", "1x16x16", "--repeats", "1"]
    options += ["--tokens", "4", "--text-channels", "16"]
    output = tmp_path / "result.json"
    places = ["--folder", str(tmp_path / "b"), "--output", str(output), "--rivals-python", "/nowhere/python"]
    with pytest.raises(InputError, match="--rivals-python /nowhere/python: no such file"):
        main([*options, "--codecs", "bfloat16", *places])
    assert main([*options, "--codecs", "bfloat16", *places[:-2]]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert {(row["reader"], row["temperature"]) for row in rows} == {
        (reader, temperature)
        for reader in ("raw", "latentmill bfloat16", "webdataset", "mosaicml-streaming", "litdata")
        for temperature in ("cold", "warm")
    }
    ours = [row for row in rows if row["reader"] == "latentmill bfloat16"]
    assert all(row["samples_per_second"] > 0 for row in ours)
    missing = [row for row in rows if row["reader"] == "litdata"]
    assert all(row["note"].startswith("not installed: python -m venv") for row in missing if row["of_raw"] is None)
    assert "| latentmill bfloat16 | warm |" in capsys.readouterr().out


def test_a_benchmark_of_a_cache_that_is_not_there_says_so_in_one_line(tmp_path):
    with pytest.raises(InputError, match="/none: found no dataset.json: expected the folder or URL of a cache"):
        main(["--cache", str(tmp_path / "none")])


def test_a_benchmark_of_too_few_samples_is_refused():
    with pytest.raises(InputError, match="samples=5: expected at least 10 batches, 320"):
        main(["--samples", "5"])
