"""Speed and utilisation."""

import json
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import InputError
from train.boards import open_boards, require_boards
from train.config import LogOptions
from train.data import Batch
from train.diffusion.terms import LossTerms
from train.metrics import MetricsLog, StepMetrics, Totals
from train.model.config import STDiTConfig
from train.model.flops import training_flop
from train.parallel.verdict import Verdict
from train.peak import Peak, find_peak, known_peak, utilisation
from train.step import StepResult


def test_utilisation_is_operations_over_time_over_devices_over_peak():
    tflops, mfu = utilisation(model_flop=8e15, seconds=2.0, world_size=4, peak_tflops=2000.0)
    assert tflops == 1000.0
    assert mfu == 0.5


def test_tensorboard_that_is_missing_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for options, name in ((LogOptions(tensorboard=True), "tensorboard"), (LogOptions(wandb="mine"), "wandb")):
        with pytest.raises(InputError, match=rf"--{name}: .* not installed: pip install 'latentmill\[{name}\]'"):
            require_boards(options)
    require_boards(LogOptions())


class FakeWandB(types.ModuleType):
    """What of the package is called, kept."""

    Video = staticmethod(lambda file, caption: (file, caption))

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def init(self, **settings: Any) -> "FakeWandB":
        self.runs.append(settings)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))


def test_weights_and_biases_keeps_runs_apart_and_goes_on_with_one(monkeypatch, tmp_path):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = LogOptions(wandb="mine")
    for place, first_step in (("a/run", 0), ("b/run", 0), ("a/run", 5)):
        (board,) = open_boards(options, tmp_path / place, {"lr": 0.1}, first_step)
    one, other, again = fake.runs
    assert one == again
    assert one["id"] != other["id"]
    assert (one["project"], one["name"], one["resume"], one["config"]) == ("mine", "run", "allow", {"lr": 0.1})
    board.numbers(6, {"loss": 0.5})
    board.clip(6, "bird", np.zeros((2, 2, 3), np.uint8), tmp_path / "bird.mp4", "A bird.")
    assert fake.logged == [(6, {"loss": 0.5}), (6, {"previews/bird": (str(tmp_path / "bird.mp4"), "A bird.")})]


def test_peaks_are_given_looked_up_or_measured():
    assert known_peak("NVIDIA H200") == known_peak("NVIDIA H100 80GB HBM3") == 989.0
    assert known_peak("NVIDIA H100 PCIe") == 756.0
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312.0
    assert known_peak("unheard of") is None
    cpu = torch.device("cpu")
    assert find_peak(cpu, torch.bfloat16, 5.0) == Peak(tflops=5.0, source="given")
    measured = find_peak(cpu, torch.bfloat16, None)
    assert measured.source == "measured"
    assert 1e-4 < measured.tflops < 100


def test_a_line_of_the_log_holds_the_means_and_the_rates(ranks, tmp_path):
    config = STDiTConfig(hidden_size=32, depth=1, num_heads=2)
    batch = Batch(
        latents=torch.zeros(2, 4, 3, 4, 6),
        u=torch.zeros(2, dtype=torch.float64),
        noise_keys=torch.zeros(2, dtype=torch.int64),
        captions=torch.zeros(2, 1, 5, 8),
        mask=torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]),
        drop_caption=torch.zeros(2, dtype=torch.bool),
        fps=torch.full((2,), 8.0),
        height=torch.full((2,), 32.0),
        width=torch.full((2,), 48.0),
        identity=torch.zeros(2, 2, dtype=torch.int64),
    )
    totals = Totals(torch.device("cpu"), ("mse", "vb"))
    for loss in (1.0, 3.0):
        parts = {"mse": torch.full((2,), loss / 2), "vb": torch.zeros(2)}
        terms = LossTerms(loss=torch.full((2,), loss), parts=parts)
        result = StepResult(terms=terms, grad_norm=torch.tensor(0.5), verdict=Verdict(torch.tensor(1.0)))
        totals.add(result, batch, config, wait_seconds=0.25)
    totals.start -= 2.0
    metrics = totals.metrics(step=7, lr=0.1, ranks=ranks, peak=Peak(tflops=0.001, source="given"))
    assert (metrics.step, metrics.loss, metrics.parts) == (7, 2.0, {"mse": 1.0, "vb": 0.0})
    assert metrics.step_ms == pytest.approx(1000, rel=0.1)
    assert metrics.samples_per_second == pytest.approx(2, rel=0.1)
    assert metrics.tokens_per_second == pytest.approx(2 * 3 * 6, rel=0.1)
    assert metrics.data_wait_ms == 250
    assert metrics.data_wait_fraction == pytest.approx(0.25, rel=0.1)
    flop = 4 * training_flop(config, num_frames=3, frame_tokens=6, caption_tokens=3)
    assert metrics.tflops_per_device == pytest.approx(flop / 2 / 1e12, rel=0.1)
    assert metrics.mfu == pytest.approx(flop / 2 / 1e9, rel=0.1)

    boards = open_boards(LogOptions(tensorboard=True), tmp_path, {}, 0)
    MetricsLog(tmp_path, steps=9, first_step=0, boards=boards).write(metrics)
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (written["loss"], written["mse"], written["vb"]) == (2.0, 1.0, 0.0)
    boards[0].clip(7, "a-clip", np.full((4, 6, 3), 200, np.uint8), tmp_path / "a.mp4", "a clip")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == written.keys() - {"step"}
    (point,) = events.Scalars("loss")
    assert (point.step, point.value) == (7, 2.0)
    (picture,) = events.Images("previews/a-clip")
    assert (picture.step, picture.height, picture.width) == (7, 4, 6)
    open_boards(LogOptions(tensorboard=True), tmp_path, {}, 6)[0].numbers(7, {"loss": 1.0})
    again = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in again.Scalars("loss")] == [(7, 1.0)]


def test_the_time_left_is_by_all_that_happened_since_the_first_line(tmp_path, capsys):
    now = iter([100.0, 160.0, 190.0])
    log = MetricsLog(tmp_path, steps=10_000, first_step=0, clock=lambda: next(now))
    for step in (10, 20, 10_000):
        log.write(
            StepMetrics(
                step=step,
                loss=1.0,
                parts={},
                grad_norm=1.0,
                lr=0.1,
                samples_per_second=1.0,
                tokens_per_second=1.0,
                step_ms=1000.0,
                data_wait_ms=1.0,
                data_wait_fraction=0.1,
                tflops_per_device=1.0,
                mfu=0.1,
                peak_memory_gib=1.0,
            )
        )
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.endswith(" | 2:46:30 left")
    assert second.endswith(" | 16:38:00 left"), "6 s a step with what was saved between the lines"
    assert "left" not in last
