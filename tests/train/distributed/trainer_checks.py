"""Checks of the trainer that two ranks make together, see ``launch``."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from shared.cache.dataset import Cache
from shared.errors import InputError
from shared.spec import Bucket
from tests.conftest import CLIPS
from tests.train.synthetic_cache import write_cache
from train import trainer as train_module
from train.batches import open_batches
from train.checkpoint_files import WEIGHTS_FILE, list_checkpoints
from train.config import TrainConfig
from train.data import Batch
from train.held_out import FixedSamples
from train.loader import load_batches
from train.parallel.ranks import Ranks
from train.run_reader import FolderReader
from train.setup import check_run
from train.trainer import train

SOUND, BROKEN = Bucket(2, 32, 32), Bucket(3, 32, 48)


def config_for(ranks: Ranks, folder: Path, *, broken: int, **changes: object) -> TrainConfig:
    """Returns a small run, on a cache whose clips of one bucket overflow."""
    if ranks.is_first:
        write_cache(folder / "cache", {SOUND: 9}, codecs=("float32", "float32"))
        if broken:
            write_cache(folder / "cache", {BROKEN: broken}, codecs=("float32", "float32"), seed=7, latent_scale=1e37)
    ranks.barrier()
    return TrainConfig.of(
        cache=str(folder / "cache"),
        output=folder / "run",
        model="stdit-ti/2",
        model_settings=("depth=2", "hidden_size=32", "num_heads=2"),
        batch_size=2,
        steps=8,
        lr=1e-3,
        log_every=1,
        checkpoint_every=1,
        keep_checkpoints=99,
        num_workers=0,
        peak_tflops=1.0,
        **changes,
    )


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def a_step_that_is_no_finite_number_anywhere_is_taken_nowhere(ranks: Ranks, folder: Path) -> None:
    for stage in (2, 3):
        base = config_for(ranks, folder / str(stage), broken=2, zero_stage=stage, ema_decay=None, on_nan="skip")
        assert train(base, ranks) == 0
        left_out = {int(line["step"]) for line in lines(base.output) if line["nan_steps"]}
        assert 0 < len(left_out) < 8, left_out
        weights = [load_file(checkpoint / WEIGHTS_FILE) for checkpoint in list_checkpoints(base.output)]
        for step in range(2, 9):
            before, after = weights[step - 2], weights[step - 1]
            same = all(torch.equal(before[name], after[name]) for name in before)
            assert same == (step in left_out), (stage, step)


def a_run_that_stops_says_once_which_sample_it_was(ranks: Ranks, folder: Path) -> None:
    config = config_for(ranks, folder, broken=2)
    if ranks.is_first:
        with pytest.raises(InputError, match=r"step \d+: the loss is no finite number for 3x32x48-7-\d.mp4"):
            train(config, ranks)
    else:
        with pytest.raises(SystemExit):
            train(config, ranks)
    ranks._failed_together = False


def a_damaged_checkpoint_is_told_once_whichever_rank_looks_at_it(ranks: Ranks, folder: Path) -> None:
    config = config_for(ranks, folder, broken=0).changed(steps=1)
    train(config, ranks)
    weights = list_checkpoints(config.output)[-1] / WEIGHTS_FILE
    if ranks.is_first:
        weights.write_bytes(weights.read_bytes()[:1000])
    ranks.barrier()
    with pytest.raises(InputError if ranks.is_first else SystemExit) as raised:
        train(config, ranks)
    if ranks.is_first:
        assert f"{weights}: found" in str(raised.value)
    ranks._failed_together = False


def a_sample_that_one_rank_cannot_read_is_told_once(ranks: Ranks, folder: Path) -> None:
    config = config_for(ranks, folder, broken=0).changed(holdout="30%", evaluate_every=9, steps=9)
    batches = open_batches(check_run(config, ranks), ranks, first_step=0)
    of_second_rank = ranks.gather([batch.samples[0] for batch in islice(batches, 2)])[1][1]
    held = FixedSamples.open(config, 9, held_out=True)
    (of_evaluation,) = next(held.read(held.share(1, 2))).samples
    ranks.barrier()
    for damaged, read in ((of_evaluation, range(9, 10)), (of_second_rank, range(2))):
        if ranks.is_first:
            damage(Cache.open(folder / "cache"), damaged)
        ranks.barrier()
        with pytest.raises(InputError if ranks.is_first else SystemExit) as raised:
            train(config.changed(output=folder / damaged), ranks)
        ranks._failed_together = False
        if ranks.is_first:
            assert "found CRC32C" in str(raised.value)
            assert len(lines(folder / damaged)) in read


def an_error_of_one_rank_ends_all_and_is_told_by_the_first(ranks: Ranks, folder: Path) -> None:
    config = config_for(ranks, folder, broken=0)

    def gone(*_: Any) -> NoReturn:
        raise OSError(5, "Input/output error", "a device")

    for owner, name in ((FolderReader, "checked"), (train_module, "device_memory")):
        told = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(told):
            if ranks.rank == 1:
                patch.setattr(owner, name, gone)
            with pytest.raises(SystemExit if ranks.is_first else OSError) as raised:
                train(config.changed(output=folder / name), ranks)
        assert ranks.ends_alone
        ranks.ends_alone = False
        if ranks.is_first:
            assert isinstance(raised.value, SystemExit)
            assert raised.value.code == 1
            assert "error: rank 1 failed: OSError: [Errno 5] Input/output error: 'a device'" in told.getvalue()


def every_rank_waits_for_the_slowest_ones_batch(ranks: Ranks, folder: Path) -> None:
    config = config_for(ranks, folder, broken=0)
    run = check_run(config, ranks)
    slow_seconds = 0.5

    def batches_late(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for batch in load_batches(*args, **kwargs):
            time.sleep(slow_seconds * ranks.rank)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.batches.load_batches", batches_late)
        batches = open_batches(run, ranks, first_step=0)
        for _ in range(2):
            ranks.barrier()
            began = time.perf_counter()
            next(batches)
            assert time.perf_counter() - began > 0.8 * slow_seconds


def damage(cache: Cache, sample: str) -> None:
    """Changes a byte of a sample's latent."""
    (row,) = (row for row in cache.read_index(columns=["sample", "latent"]).to_pylist() if row["sample"] == sample)
    file = cache.store.local_path(row["latent"]["shard"])
    assert file is not None
    data = bytearray(file.read_bytes())
    data[row["latent"]["offset"] + row["latent"]["bytes"] // 2] ^= 1
    file.write_bytes(data)


def an_evaluation_on_two_ranks_is_that_of_one(ranks: Ranks, folder: Path) -> None:
    common = {"holdout": "60%", "evaluate_samples": 5, "steps": 2, "precision": "float32"}
    config = config_for(ranks, folder, broken=0).changed(evaluate_every=1, **common)
    train(config, ranks)
    shared = config.changed(output=folder / "shared", sequence_parallel=2, zero_stage=3)
    train(shared, ranks)
    if ranks.is_first:
        for mine, other in zip(lines(config.output), lines(shared.output), strict=True):
            assert mine.keys() == other.keys()
            for name in mine:
                if name.startswith("eval"):
                    assert other[name] == pytest.approx(mine[name], rel=1e-4), name
        (folder / "found.json").write_text(json.dumps(lines(config.output)))


def products_in_8_bits_of_samples_that_are_shared_are_those_of_one_rank(ranks: Ranks, folder: Path) -> None:
    config = config_for(ranks, folder, broken=0, products="float8").changed(steps=3)
    shared = config.changed(output=folder / "shared", sequence_parallel=2, zero_stage=3)
    for each in (config, shared):
        train(each, ranks)
    if ranks.is_first:
        alone, together = ([line["loss"] for line in lines(each.output)] for each in (config, shared))
        assert together == pytest.approx(alone, rel=5e-3)


def ranks_whose_run_had_graphs_leave_their_group(ranks: Ranks, folder: Path) -> None:
    """After this check, the last one: where graphs that exchange are left, NCCL waits for them forever."""
    config = config_for(ranks, folder, broken=0, precision="float32")
    recorded = config.changed(output=folder / "graphs", cuda_graphs=True)
    for each in (config, recorded):
        assert train(each, ranks) == 0
    if ranks.is_first:
        expected, found = ([line["loss"] for line in lines(each.output)] for each in (config, recorded))
        assert found == pytest.approx(expected, rel=1e-3)


def online_config(folder: Path) -> TrainConfig:
    """Returns a small run on clips that it encodes itself."""
    return TrainConfig.of(
        online=str(CLIPS / "clips.csv"),
        buckets=("8x48x48",),
        vae="demo:vae",
        text_encoder="demo:t5",
        windows_per_clip=2,
        output=folder / "run",
        model="stdit-ti/2",
        model_settings=("depth=2", "hidden_size=32", "num_heads=2"),
        precision="float32",
        batch_size=4,
        steps=3,
        log_every=1,
        num_workers=1,
        peak_tflops=1.0,
    )


def clips_encoded_online_give_each_rank_its_part_of_the_batch(ranks: Ranks, folder: Path) -> None:
    config = online_config(folder)
    assert train(config, ranks) == 0
    shared = config.changed(output=folder / "shared", sequence_parallel=2)
    assert train(shared, ranks) == 0
    if ranks.is_first:
        found = [line["loss"] for line in lines(config.output)]
        close = 1e-5 if ranks.device.type == "cpu" else 1e-3
        assert [line["loss"] for line in lines(shared.output)] == pytest.approx(found, rel=close)
        (folder / "found.json").write_text(json.dumps(found))
