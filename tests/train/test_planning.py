"""What a run will take, before it runs."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from shared.errors import InputError
from train.config import OptimiserOptions, ParallelOptions, TrainConfig
from train.diffusion.objective import create_objective
from train.loss import batch_loss
from train.model import attention_layers, blocks, model_config, stdit
from train.model.checkpointing import ACTIVATION_CHECKPOINTING, Recomputation
from train.model.long_time_attention import long_time_attention
from train.ops import float8_linear
from train.planning.activations import meta_batch, meta_model, working_bytes
from train.planning.allocations import Allocations
from train.planning.dry_run import describe, largest_buckets, plan_bucket
from train.planning.fitting import fit_checkpointing, ladder, least_recomputation
from train.planning.memory import plan_memory
from train.setup import plan_run
from train.trainer import train


def test_what_a_computation_holds_at_once_is_counted_to_the_byte():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
        x = torch.empty(64, 256)
    allocations = Allocations()
    with allocations:
        allocations.leave_out(x, *model.parameters())
        y = model(x)
        hidden, out = 64 * 1024 * 4, 64 * 256 * 4
        assert allocations.live == hidden + out  # ReLU keeps its result, which the second layer reads too
        assert allocations.peak == 2 * hidden  # while ReLU reads what the first layer made
        del y
    assert allocations.live == 0


def shaped(name: str, checkpointing: str, *, samples: int, frames: int = 8, **options):
    """A model without content, its objective and a batch."""
    options = TrainConfig.of(cache="c", output=Path("o"), activation_checkpointing=checkpointing, **options)
    model = meta_model(model_config(name, depth=4), options)
    batch = meta_batch(samples, (4, frames, 32, 32), (120, 4096), torch.bfloat16)
    return model, create_objective(None, model=name, spatial_stride=8), batch


def working(batch_size: int, checkpointing: str, *, name: str = "stdit-s/2", **options) -> int:
    return working_bytes(*shaped(name, checkpointing, samples=batch_size, **options), gradient_shards=1)


def test_activations_grow_with_the_samples_and_shrink_by_what_is_computed_again():
    none = {size: working(size, "none") for size in (2, 4, 6)}
    assert none[6] - none[4] == pytest.approx(none[4] - none[2], rel=0.02)
    assert working(4, "full") < 0.6 * working(4, "selective") < 0.6 * none[4]
    assert working(4, "none", precision="float32") > 1.6 * none[4]


@pytest.mark.parametrize("name", ["stdit-s/2", "stdit3-s/2", "dit-s/2"])
def test_each_choice_of_auto_fits_wherever_the_one_before_does(name):
    choices = ladder(8 if name.startswith("stdit3") else 4)
    found = [working(4, each.mode, name=name, checkpointed_blocks=each.blocks) for each in choices]
    assert found == sorted(found, reverse=True)
    at = {str(choice): bytes_ for choice, bytes_ in zip(choices, found, strict=True)}
    assert at["full"] < at["attention"] < at["attention in 1 block, selective in the others"] < at["none"]
    assert at["full"] < at["none"] / 2
    assert working(4, "selective", name=name) >= at[f"selective in {len(choices) // 3 - 1} blocks"]


@pytest.mark.parametrize(
    ("name", "frames", "tensors", "backend"),
    [
        ("stdit-s/2", 8, 1, None),
        ("stdit-s/2", 128, 2, None),
        ("stdit3-s/2", 8, 1, None),
        ("dit-s/2", 8, 1, None),
        ("dit-s/2", 8, 1, "cudnn"),
        ("dit-s/2", 8, 1, "flash"),
        ("stdit-s/2", 8, 1, "efficient"),
        ("stdit-s/2", 8, 0, "math"),
    ],
)
def test_attention_to_many_tokens_is_kept_and_to_few_is_not_by_whichever_kernel(name, frames, tensors, backend):
    """Beside the result of each MLP's second product; ``math`` is products."""
    kept = {}
    for mode in ("attention", "full", "attention"):  # positions are made once
        model, objective, batch = shaped(name, mode, samples=2, frames=frames, attention_backend=backend)
        noise = torch.empty(batch.latents.shape, dtype=torch.float32, device="meta")
        allocations = Allocations()
        with allocations:
            allocations.leave_out(*model.parameters(), *model.buffers())
            terms = batch_loss(model, objective, batch, wants_size=model.wants_size, noise=noise)
            kept[mode] = allocations.live
        del terms
    results = 2 * frames * 256 * 384 * 2
    statistics = 2 * frames * 256 * 6 * 4
    mlps = 8 if name.startswith("stdit3") else 4
    attention = 4 * tensors * (results + statistics)
    assert kept["attention"] - kept["full"] == pytest.approx(attention + mlps * results, rel=1e-3)


@pytest.mark.parametrize("name", ["stdit-s/2", "dit-s/2"])
def test_of_products_in_8_bits_as_much_is_kept_as_of_others(name):
    plain, float8 = (
        {mode: working(4, mode, name=name, products=products) for mode in ACTIVATION_CHECKPOINTING}
        for products in (None, "float8")
    )
    widest = 4 * 8 * 256 * 4 * 384
    for mode in ACTIVATION_CHECKPOINTING:  # more by what a product reads in 8 bits, and by its gradient
        assert 0 < float8[mode] - plain[mode] < 2.2 * widest, mode
    assert float8["attention"] - float8["full"] == plain["attention"] - plain["full"]


@pytest.mark.parametrize("name", ["stdit-s/2", "stdit3-s/2", "dit-s/2"])
def test_what_norms_write_in_8_bits_ahead_is_counted_where_they_do(name, monkeypatch):
    """Not where selective checkpointing looks on. The backward pass, which takes most, has none of it."""
    forward = float8_linear._forward

    def held_at_products(mode):
        held, allocations = [], Allocations()
        model, objective, batch = shaped(name, mode, samples=2, products="float8")
        noise = torch.empty(batch.latents.shape, dtype=torch.float32, device="meta")
        monkeypatch.setattr(float8_linear, "_forward", lambda *given: held.append(allocations.live) or forward(*given))
        with allocations:
            allocations.leave_out(*model.parameters(), *model.buffers())
            batch_loss(model, objective, batch, wants_size=model.wants_size, noise=noise)
        return held

    held_at_products("none")  # positions are made once
    ahead = {mode: held_at_products(mode) for mode in ACTIVATION_CHECKPOINTING}
    for module in (attention_layers, blocks, stdit):
        monkeypatch.setattr(module, "rows_for", lambda reader, x: None)
    rows = 2 * 8 * 256 * (384 + 4)
    for mode in ACTIVATION_CHECKPOINTING:
        more = {one - other for one, other in zip(ahead[mode], held_at_products(mode), strict=True)}
        assert more - {0} == (set() if mode in ("selective", "attention") else {rows}), mode


def test_a_rank_that_shares_samples_takes_its_part_of_them_and_what_it_exchanges():
    for name, most in (("stdit-s/2", 0.6), ("dit-s/2", 0.65)):
        whole, half = (working(4, "full", name=name, sequence_parallel=degree) for degree in (1, 2))
        assert whole / 2 < half < most * whole


def test_auto_takes_the_least_recomputation_that_fits_whatever_the_memory():
    kept = {"none": 12, "selective": 7, "attention": 3, "full": 1}

    def needed(choice):
        return 100 + sum(kept[mode] for mode in choice.of_each(4))

    expected = {needed(choice): choice for choice in ladder(4)}
    assert len(expected) == 1 + 3 + 4 + 4
    for device_bytes in range(104, 160):
        fits = max(each for each in expected if each <= device_bytes)
        assert least_recomputation(4, needed, device_bytes) == expected[fits]
    assert least_recomputation(4, needed, 1) == Recomputation(mode="full")


def test_a_run_computes_again_what_its_largest_bucket_needs_and_no_more(ranks, small_config):
    wide = ("depth=3", "hidden_size=256", "num_heads=4")
    config = small_config.changed(activation_checkpointing="auto", batch_size=64, zero_stage=0, model_settings=wide)
    run = plan_run(config, data_rank=0, num_data_ranks=1, device_type="cpu")
    (bucket,) = largest_buckets(run, 1)

    def needed(mode, blocks=None):
        fixed = config.changed(activation_checkpointing=mode, checkpointed_blocks=blocks)
        return plan_bucket(dataclasses.replace(run, config=fixed), bucket, 1).memory.needed

    assert fit_checkpointing(run, 1, needed("none")).config.parallel.recomputation.mode == "none"
    least = needed("attention", 2)
    chosen = fit_checkpointing(run, 1, least).config.parallel.recomputation
    assert chosen == Recomputation(mode="attention", blocks=2)
    assert least < needed("attention", 1)
    with pytest.raises(InputError, match="activation_checkpointing=auto: there is no GPU here"):
        train(config, ranks)
    config = config.changed(device_memory_gib=least / 2**30, steps=1)
    assert train(config, ranks) == 0
    assert json.loads((config.output / "run.json").read_text())["config"]["activation_checkpointing"] == "auto"
    with pytest.raises(InputError, match=r"needs about .* found .* GiB"):
        train(config.changed(output=config.output / "small", device_memory_gib=0.5), ranks)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_attention_by_products_is_counted_with_its_probabilities(precision):
    width = 2 if precision == "bfloat16" else 4
    flat = working(2, "none", precision=precision, attention_backend="efficient")
    probabilities = 2 * 8 * 6 * 256 * 256 * width
    assert working(2, "none", precision=precision, attention_backend="math") > flat + 4 * probabilities


def test_attention_along_more_frames_than_our_kernels_take_keeps_no_probabilities():
    qkv = torch.empty(1, 256, 64, 3, 16, 72, dtype=torch.bfloat16, device="meta", requires_grad=True)
    allocations = Allocations()
    with allocations:
        allocations.leave_out(qkv)
        long_time_attention(qkv).sum().backward()
    assert allocations.peak < 4 * qkv.numel() * qkv.element_size()  # the plain form takes 9 times as much as qkv


def test_a_stage_shares_what_it_says_it_shares():
    def plan(stage, world_size, parts=1, size=1000, **changes):
        parallel, optimiser = (
            ParallelOptions(zero_stage=stage, **changes),
            OptimiserOptions(gradient_accumulation=parts),
        )
        return plan_memory(parallel, optimiser, num_weights=size, num_trained=size, world_size=world_size, working=7)

    one, eight = plan(2, 1), plan(2, 8)
    assert (one.weights, one.masters, one.moments, one.average) == (2000, 4000, 8000, 4000)
    assert (eight.weights, eight.masters, eight.moments, eight.average) == (2000, 500, 1000, 500)
    assert (one.reduce_bucket, one.update) == (0, 2 * 2000)  # gradients, and all of them in one bucket
    assert (eight.reduce_bucket, eight.update) == (
        3 * 2000,
        250,
    )  # a bucket that fills, two that are sent: of all ranks
    assert (plan(1, 8).reduce_bucket, plan(1, 8).update) == (0, 2000 + 3 * 2000)
    large = plan(2, 4, size=2**26)  # where each rank's part is a bucket
    assert (large.reduce_bucket, large.update) == (3 * 2**25, 2**25)
    assert plan(2, 1, parts=2).reduce_bucket == 1_000_000_000  # DeepSpeed's
    assert plan(2, 1, parts=2).update == 2 * 4000 + 4000
    assert plan(3, 8).weights == 2 * 125 + 2000
    whole = plan(0, 8, precision="float32")
    assert (whole.weights, whole.masters, whole.moments, whole.update) == (4000, 0, 8000, 4000)
    offloaded = plan(3, 8, offload="all")
    assert (offloaded.weights, offloaded.masters, offloaded.moments, offloaded.average) == (2000, 0, 0, 0)
    assert one.peak > one.resident
    assert one.needed > one.peak


def test_more_holes_are_counted_where_the_users_allocator_has_segments_of_fixed_size(small_config, monkeypatch):
    run = plan_run(small_config, data_rank=0, num_data_ranks=1, device_type="cuda")
    needed = {}
    for told in ("expandable_segments:True", "expandable_segments:False"):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", told)
        memory = plan_bucket(run, run.plan.buckets[0], 1).memory
        needed[told] = (memory.needed - memory.outside) / memory.peak
    assert list(needed.values()) == pytest.approx([1.01, 1.04])


def test_a_dry_run_says_what_fits_and_writes_nothing(small_config):
    config = small_config.changed(batch_size=8, device_memory_gib=8.0, precision="float32", zero_stage=0)
    run = plan_run(config, data_rank=0, num_data_ranks=4, device_type="cuda")
    text = describe(run, 4)
    assert "ranks       4, ZeRO 0, float32" in text
    assert re.search(r"3x32x48 +8 +2 +144 ", text)  # 18 tokens a sample, 8 samples, 2 a rank
    assert text.endswith("fits on devices of 8 GiB")
    assert [str(bucket) for bucket in largest_buckets(run, 9)] == ["3x32x48", "2x32x32"]
    assert not small_config.output.exists()


def test_a_dry_run_with_graphs_says_so_and_what_they_keep(small_config):
    config = small_config.changed(cuda_graphs=True, model_settings=("depth=12", "hidden_size=192", "num_heads=3"))
    run = plan_run(config, data_rank=0, num_data_ranks=1, device_type="cuda")
    text = describe(run, 1)
    (largest,) = largest_buckets(run, 1)
    kept = plan_bucket(run, largest, 1).memory.places / 2**30
    assert kept > 0.01
    assert "1 part a step, CUDA graphs\n" in text
    assert f", places of graphs {kept:.2f}; and what steps add:\n" in text
    without = plan_run(config.changed(cuda_graphs=False), data_rank=0, num_data_ranks=1, device_type="cuda")
    assert "graphs" not in describe(without, 1)


def test_a_bucket_that_is_too_large_for_the_memory_is_refused_before_training(ranks, small_config):
    config = small_config.changed(device_memory_gib=0.5)
    with pytest.raises(
        InputError, match=r"bucket 3x32x48, 4 samples at a time: needs about \d\.\d GiB a device, found 0.5 GiB: use"
    ):
        train(config, ranks)
    assert not (config.output / "checkpoints").exists()


def test_the_plan_of_a_bucket_counts_all_samples_and_parts_them(small_config):
    run = plan_run(small_config.changed(gradient_accumulation=2), data_rank=0, num_data_ranks=1, device_type="cuda")
    (bucket,) = largest_buckets(run, 1)
    plan = plan_bucket(run, bucket, 1)
    assert (plan.batch_size, plan.micro_batch, plan.tokens) == (4, 2, 72)
    whole = plan_run(small_config, data_rank=0, num_data_ranks=1, device_type="cuda")
    assert plan_bucket(whole, bucket, 1).memory.working > plan.memory.working
