"""The step benchmarks on a tiny model: rows run, variants compute the same, every millisecond has a part."""

import dataclasses
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import InputError
from train.benchmark import images, stdit, step_command
from train.benchmark.attention_choice import attention_of
from train.benchmark.measuring import different_variants, failed_row, measure
from train.benchmark.online import measure_online
from train.benchmark.online_encoders import EncoderSizes, OnlineWork
from train.benchmark.parts import PartTimes
from train.benchmark.step_report import speed_table, tables, time_table
from train.benchmark.step_settings import IMAGES, ONLINE, STDIT, WAYS
from train.benchmark.steps import Bench, StepRow, Timing
from train.benchmark.variants import FUSED, FUSED_CUDNN, FUSED_FLOAT8, PLAIN, running_as
from train.data import Batch
from train.model import attention, build_model, flash_attention_3, model_config
from train.parallel.ranks import Ranks
from train.step import TrainingStep

TINY = {"depth": 2, "hidden_size": 32, "num_heads": 2, "caption_channels": 16, "model_max_length": 130}
QUICK = Timing(warmup=0, steps=1)


def _inputs(caption_channels: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, 3, 4, 6), torch.tensor([3.0, 500.0]), torch.randn(2, 1, 130, caption_channels)


def _tiny(name: str, **changes: object) -> object:
    setting = next(each for each in STDIT if each.name == name)
    return dataclasses.replace(setting, size=32, batch=2, **changes)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("stdit-xl/2 16x256", "full"), ("dit-xl/2 16x256", "none"), ("stdit3-xl/2 16x256", "selective")],
)
def test_every_variant_of_a_row_is_measured_with_its_parts(
    name: str, checkpointing: str, ranks: Ranks, tmp_path: Path
) -> None:
    rows = measure(
        _tiny(name, variants=(PLAIN, FUSED), checkpointing=checkpointing), ranks, QUICK, overrides=TINY, trace=tmp_path
    )
    assert [row.variant for row in rows] == ["plain", "ours"]
    for row in rows:
        assert row.samples_per_second * row.step_ms / 1000 == pytest.approx(2)
        assert row.tokens_per_second == pytest.approx(row.samples_per_second * 16 * 2 * 2)
        assert {"captions", "mlp", "optimiser", "rest", "data wait"} < set(row.parts_ms)
        assert sum(ms for part, ms in row.parts_ms.items() if part != "all") == pytest.approx(row.parts_ms["all"])
        assert row.parts_ms["mlp"] > 0
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_products_in_8_bits_are_measured_where_there_are_units_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(attention, "installed_packages", lambda: ())
    monkeypatch.setattr(flash_attention_3, "usable", lambda device: False)
    for capability, measured in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for setting in (STDIT[0], IMAGES[0]):
            assert (FUSED_FLOAT8 in different_variants(setting, {}, gpu)) == measured


def test_the_variant_with_products_in_8_bits_has_them_and_leaves_none_behind() -> None:
    torch.manual_seed(0)
    model = build_model(model_config("stdit-xl/2", **TINY))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = _inputs(16)
    before = model(*inputs)
    with running_as(model, FUSED_FLOAT8):
        within = model(*inputs)
    assert not torch.equal(within, before)
    torch.testing.assert_close(within, before, rtol=0, atol=0.2 * before.abs().max().item())
    assert torch.equal(model(*inputs), before)


def test_ours_runs_with_cudnn_too_only_where_it_takes_flash_attention_3(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, settings = torch.device("cuda", 0), {setting.name: setting for setting in (*STDIT, *IMAGES)}

    def with_cudnn() -> set[str]:
        return {name for name, each in settings.items() if FUSED_CUDNN in different_variants(each, {}, gpu)}

    monkeypatch.setattr(flash_attention_3, "usable", lambda device: device.type == "cuda")
    monkeypatch.setattr(attention, "installed_packages", lambda: ())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert with_cudnn() == set()
    monkeypatch.setattr(attention, "installed_packages", lambda: ("flash-attn-3",))
    packed = {f"stdit-xl/2 {size}" for size in ("16x256", "16x512", "64x512", "256x512, 2 GPUs a sample", "1x256")}
    assert with_cudnn() == packed | {"stdit3-xl/2 16x256"} | {
        f"dit-xl/2 {n}" for n in ("16x256", "16x512", "64x512", "256x512", "1x256")
    }
    alone = dataclasses.replace(STDIT[0], variants=(FUSED_CUDNN,))
    assert different_variants(alone, {}, gpu) == (FUSED_CUDNN,)

    config = model_config("dit-xl/2")
    used = {v.name: attention_of(v, config, (16, 32, 32), gpu) for v in (PLAIN, FUSED, FUSED_CUDNN)}
    assert used == {"plain": "flash", "ours": "flash-attn-3", "ours, cuDNN attention": "cudnn"}
    assert attention_of(FUSED, model_config("stdit-xl/2"), (16, 32, 32), gpu) == "flash-attn-3"
    assert attention_of(FUSED, model_config("stdit3-xl/2"), (16, 32, 32), gpu) == "flash-attn-3"
    (row,) = measure(_tiny("stdit-xl/2 16x256", variants=(FUSED,)), ranks, QUICK, overrides=TINY, trace=None)
    assert row.attention == "PyTorch's flash"
    assert "| attention |" in speed_table([row])


def test_fewer_blocks_are_scaled_to_all(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "seconds", lambda bench, _: 1 + 0.5 * bench.config.depth)
    monkeypatch.setattr(Bench, "parts", lambda _: {})
    setting = _tiny("stdit-xl/2 16x256", variants=(FUSED,), blocks=4)
    (row,) = measure(setting, ranks, QUICK, overrides={**TINY, "depth": 12}, trace=None)
    assert row.scaled_from_blocks == 4
    assert row.step_ms == pytest.approx(1000 * (1 + 0.5 * 12))
    text = tables([dataclasses.replace(row, peak_memory_gib=2.0, parts_ms={"mlp": 1.0})])
    assert "| 2.0 (4 blocks) |" in text
    assert "| 7000.0 (4 blocks, scaled) |" in text


def test_blocks_that_stand_for_more_do_what_those_of_the_whole_model_do_that_compute_most_again(ranks: Ranks) -> None:
    setting = dataclasses.replace(_tiny("stdit-xl/2 16x256", checkpointing="auto"), size=128, batch=16)

    def chosen(gib: float, blocks: int | None) -> str:
        bench = Bench(setting, ranks, {**TINY, "depth": 4, "hidden_size": 64}, blocks, device_memory_gib=gib)
        bench.set_up(FUSED)
        bench.close()
        return str(bench.recomputation)

    assert chosen(1.57, None) == "attention in 2 blocks, selective in the others"
    assert chosen(1.57, 2) == "attention"  # where two blocks by themselves would keep everything
    assert chosen(2, 2) == "none"


def test_a_variant_after_one_that_ran_out_of_memory_begins_with_a_bench_of_its_own(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, step = Bench.__init__, Bench.step
    benches: list[Bench] = []
    fails = {"building": True, "in a step": True}

    def build_or_fail(bench: Bench, *arguments: Any) -> None:
        if fails.pop("building", False):
            raise torch.OutOfMemoryError
        build(bench, *arguments)
        benches.append(bench)

    def step_or_fail(bench: Bench, *arguments: Any) -> None:
        if fails.pop("in a step", False):
            loss = bench._engine(*_inputs(bench.config.caption_channels)).square().mean()
            bench._engine.backward(loss)  # and no step: its gradients would count in the next one
            raise torch.OutOfMemoryError
        step(bench, *arguments)

    monkeypatch.setattr(Bench, "__init__", build_or_fail)
    monkeypatch.setattr(Bench, "step", step_or_fail)
    variants = (PLAIN, dataclasses.replace(PLAIN, name="again"), FUSED)
    rows = measure(_tiny("stdit-xl/2 16x256", variants=variants), ranks, QUICK, overrides=TINY, trace=None)
    assert [row.error for row in rows] == ["out of memory", "out of memory", ""]
    assert "| out of memory |" in speed_table(rows)
    assert len(benches) == 2
    assert rows[2].step_ms > 0


def test_what_has_no_memory_with_half_the_blocks_is_not_scaled_from_all_of_them(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(bench: Bench, _: Timing) -> float:
        if bench.config.depth == 2:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(Bench, "seconds", seconds)
    (row,) = measure(
        _tiny("stdit-xl/2 16x256", variants=(FUSED,), blocks=4),
        ranks,
        QUICK,
        overrides={**TINY, "depth": 12},
        trace=None,
    )
    assert row.error == "out of memory"


def test_a_bench_whose_variant_fails_gives_its_graphs_up_before_ranks_leave(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, give_memory_back = [], TrainingStep.give_memory_back

    def noted(step: TrainingStep) -> None:
        given_up.append(step)
        give_memory_back(step)

    def fail(bench: Bench, *_: object) -> StepRow:
        bench.step()
        monkeypatch.setattr(TrainingStep, "give_memory_back", noted)
        raise InputError("too few GPUs")

    monkeypatch.setattr("train.benchmark.measuring.measure_variant", fail)
    with pytest.raises(InputError, match="too few GPUs"):
        measure(_tiny("stdit-xl/2 16x256", variants=(FUSED,)), ranks, QUICK, overrides=TINY, trace=None)
    assert len(given_up) == 1


def test_one_slow_step_does_not_change_what_a_step_takes(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(_tiny("stdit-xl/2 16x256"), ranks, TINY, None)
    pauses = iter([0.0, 0.0, 1.0, 0.0, 0.0])
    monkeypatch.setattr(Bench, "step", lambda _: time.sleep(next(pauses)))
    assert bench.seconds(Timing(warmup=0, steps=5)) < 0.1
    bench.close()


def test_launching_is_measured_on_few_tokens_and_the_rows_batches_come_back(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(dataclasses.replace(_tiny("stdit-xl/2 16x256"), size=64), ranks, TINY, None)
    take, sizes = bench._step.take, []

    def noted(batch: Batch, *rest: Any) -> Any:
        sizes.append(tuple(batch.latents.shape))
        return take(batch, *rest)

    monkeypatch.setattr(bench._step, "take", noted)
    assert bench.launching_seconds(Timing(warmup=1, steps=2)) > 0
    bench.step()
    assert sizes == [(2, 4, 16, 4, 4)] * 3 + [(2, 4, 16, 8, 8)]
    bench.close()
    row = StepRow(setting="a", variant="ours", batch=2, step_ms=5.0, launching_ms=3.25)
    assert "launching alone" in time_table([row])
    assert " 3.2 " in time_table([row])


def test_class_labels_take_the_place_of_captions(ranks: Ranks) -> None:
    setting = dataclasses.replace(images.IMAGES[0], size=32, batch=2)
    bench = Bench(setting, ranks, {"depth": 1, "hidden_size": 32, "num_heads": 2}, None)
    bench.step()
    assert bench.flop() > 0
    bench.close()


def test_the_plain_variant_computes_what_the_model_does() -> None:
    torch.manual_seed(0)
    model = build_model(model_config("stdit-ti/2", **TINY))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = _inputs(16)
    results = []
    for variant in (PLAIN, FUSED):
        with running_as(model, variant):
            results.append(model(*inputs))
    assert results[0].abs().mean() > 0.1
    torch.testing.assert_close(results[0], results[1])


def test_the_command_writes_json_and_a_table(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_command, "join_ranks", lambda: nullcontext(ranks))
    monkeypatch.setattr(stdit, "STDIT", (_tiny("stdit-xl/2 16x256", variants=(PLAIN, FUSED)),))
    settings = [f"{name}={value}" for name, value in TINY.items()]
    output = tmp_path / "rows.json"
    arguments = ["--output", str(output), "--warmup", "0", "--steps", "1", "--variants", "ours", "--set", *settings]
    assert stdit.main(arguments) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["variant"] == "ours"
    assert output.with_suffix(".md").read_text().count("\n") == 7


def test_the_folder_of_the_results_is_made_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="expected the beginning"):  # such a row is not there
        stdit.main(["--output", str(tmp_path / "a" / "b" / "rows.json"), "--only", "none"])
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(InputError, match=r"--output .*/b is a folder: give the name of a JSON file"):
        stdit.main(["--output", str(tmp_path / "a" / "b")])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"rows.json: its folder was not made \(.*\): give another"):
        stdit.main(["--output", str(tmp_path / "file" / "rows.json")])


def test_columns_that_no_row_fills_are_left_out_of_the_tables() -> None:
    row = StepRow(setting="a", variant="plain", batch=2, recomputed="none", step_ms=4.0, samples_per_second=500.0)
    text = tables([row, dataclasses.replace(row, variant="ours", step_ms=2.0, parts_ms={"time": 1.0})])
    assert text.splitlines()[0] == "| what | variant | batch | samples/s | times plain |"
    assert "| a | ours | 2 | 500 | 2.00 |" in text
    assert text.splitlines()[-4] == "| milliseconds | variant | step | time |"


def test_rows_for_other_numbers_of_gpus_are_left_out_with_a_word(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_command, "join_ranks", lambda: nullcontext(ranks))
    monkeypatch.setattr(step_command, "measure", lambda setting, *_, **__: [failed_row(setting, FUSED, "not run")])
    assert stdit.main(["--only", "stdit-xl/2 16x256"]) == 0
    text = capsys.readouterr().out
    assert "stdit-xl/2 16x256, 2 GPUs: torchrun --nproc-per-node 2 -m train.benchmark stdit" in text
    assert text.count("not run") == 1
    with pytest.raises(InputError, match="no row for 1 ranks: stdit-xl/2 256x512, 2 GPUs a sample: torchrun"):
        stdit.main(["--only", "256x512, 2"])


@pytest.mark.parametrize(("seconds", "steps"), [(0.1, 8), (3.0, 3), (12.0, 2)])
def test_of_long_steps_fewer_are_timed(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int
) -> None:
    bench = Bench(_tiny("stdit-xl/2 16x256"), ranks, {**TINY, "depth": 1}, None)
    taken = []
    clock = iter(range(100))
    monkeypatch.setattr(Bench, "step", lambda _: taken.append(1))
    monkeypatch.setattr(PartTimes, "mark", lambda _: next(clock) * seconds)
    assert bench.seconds(Timing()) == pytest.approx(seconds)
    assert len(taken) == 3 + steps
    bench.close()


def test_auto_computes_again_only_what_the_memory_asks_for(ranks: Ranks) -> None:
    setting = _tiny("stdit-xl/2 16x256", checkpointing="auto")
    for gib, expected in ((80, "none"), (0.1, "full")):
        bench = Bench(setting, ranks, TINY, None, device_memory_gib=gib)
        bench.set_up(FUSED)
        assert {block.checkpointing for block in bench.model.transformer_blocks()} == {expected}
        bench.step()
        bench.close()
    with pytest.raises(InputError, match="give --device-memory-gib"):
        measure(setting, ranks, QUICK, overrides=TINY, trace=None)


def test_an_unknown_row_or_variant_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(InputError, match="expected the beginning of words of stdit-xl/2 16x256; .* 2 GPUs a sample; "):
        stdit.main(["--only", "17x17"])
    with pytest.raises(InputError, match="variants plain ones: expected some of: plain; plain, cuDNN attention; "):
        stdit.main(["--variants", "plain ones"])
    assert {row.model for row in STDIT if row.is_named(("dit", "stdit3"))} == {"dit-xl/2", "stdit3-xl/2"}


def test_online_rows_stand_beside_the_cached_one_and_train_on_what_was_encoded(ranks: Ranks) -> None:
    t5 = {"num_layers": 1, "d_ff": 32, "d_model": 16, "num_heads": 2, "d_kv": 8}
    sizes = EncoderSizes(t5=t5, vae={"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1})
    setting = dataclasses.replace(ONLINE[0], size=32, batch=2, frames=2)
    rows = measure_online(setting, ranks, QUICK, overrides=TINY, sizes=sizes, device_memory_gib=80)
    assert [row.variant for row in rows] == ["cached", *WAYS]
    assert "encoders" not in rows[0].parts_ms
    assert all(row.parts_ms["encoders"] > 1 for row in rows[1:])
    assert all(row.sum_of_parts_ms == row.encoders_alone_ms + rows[0].step_ms for row in rows[1:])
    assert "times cached" in speed_table(rows)
    assert "step against that" in time_table(rows)

    work = OnlineWork(frames=2, size=32, batch=2, caption_tokens=9, sizes=sizes, device=torch.device("cpu"))
    bench = Bench(setting, ranks, TINY, None)
    seen = []
    for way in work.ways().values():
        bench.prepare = lambda batch, way=way: seen.append(way(batch)) or seen[-1]
        bench.step()
    assert seen[0].latents.shape == (2, 4, 2, 4, 4)
    for other in seen[1:]:
        torch.testing.assert_close(seen[0].captions, other.captions, rtol=0.02, atol=0.02)
    bench.close()
