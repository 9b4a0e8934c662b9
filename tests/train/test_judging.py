"""Evaluations on held-out samples and previews, while a run goes on."""

import json
import os
import signal

import av
import pytest
import torch
from safetensors.torch import load_file

from shared.errors import InputError
from shared.spec import Bucket
from tests.train.conftest import BUCKETS
from tests.train.fake_encoders import use_fake_encoders
from tests.train.synthetic_cache import write_cache
from train.building import build_model
from train.checkpoint_files import EMA_FILE, WEIGHTS_FILE, list_checkpoints
from train.evaluation import Evaluation
from train.held_out import FixedSamples
from train.metrics import MetricsLog
from train.sampling.files import file_stem
from train.setup import check_run
from train.step import TrainingStep
from train.stop import STOPPED
from train.trainer import train

EVALUATED = {"holdout": "40%", "evaluate_samples": 3, "evaluate_levels": 2, "precision": "float32"}


def evaluations(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def test_a_run_is_evaluated_on_what_it_holds_out_and_trains_as_if_it_were_not(ranks, small_config):
    judged = small_config.changed(evaluate_every=2, **EVALUATED)
    train(judged, ranks)
    plain = small_config.changed(holdout="40%", precision="float32", output=small_config.output.with_name("plain"))
    train(plain, ranks)
    last, other = (load_file(list_checkpoints(c.output)[-1] / WEIGHTS_FILE) for c in (judged, plain))
    assert all(torch.equal(last[name], other[name]) for name in last)
    found = evaluations(judged.output)
    assert [line["step"] for line in found] == [2, 4, 6]
    assert set(found[0]) == {
        *("step", "eval_loss", "eval_mse", "eval_vb", "eval_loss_noise_0-50%", "eval_loss_noise_50-100%")
    }
    for line in found:
        halves = [line["eval_loss_noise_0-50%"], line["eval_loss_noise_50-100%"]]
        assert line["eval_loss"] == pytest.approx(sum(halves) / 2)
        assert line["eval_loss"] == pytest.approx(line["eval_mse"] + line["eval_vb"])
    assert not evaluations(plain.output)


def test_what_a_signal_puts_off_is_judged_when_the_run_goes_on_with_the_same_figures(ranks, small_config, monkeypatch):
    whole = small_config.changed(evaluate_every=2, **EVALUATED)
    train(whole, ranks)
    parts = whole.changed(output=whole.output.with_name("parts"))
    take = TrainingStep.take
    signals = iter([False, True, False, False, False, True])  # at steps 2 and 6

    def take_with_signals(*arguments):
        if next(signals):
            os.kill(os.getpid(), signal.SIGUSR1)
        return take(*arguments)

    monkeypatch.setattr(TrainingStep, "take", take_with_signals)
    assert [train(parts, ranks) for _ in range(2)] == [STOPPED, STOPPED]  # of the last step an evaluation is left
    assert [line["step"] for line in evaluations(parts.output)] == [2, 4]
    assert [train(parts, ranks) for _ in range(2)] == [0, 0]
    assert evaluations(parts.output) == evaluations(whole.output)


def test_what_ends_an_evaluation_loses_neither_its_step_nor_the_evaluation(ranks, small_config, monkeypatch):
    config = small_config.changed(evaluate_every=2, checkpoint_every=2, **EVALUATED)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "losses", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, ranks)
    assert [path.name for path in list_checkpoints(config.output)] == ["step-00000002"]
    assert train(config, ranks) == 0
    assert [line["step"] for line in evaluations(config.output)] == [2, 4, 6]


def test_an_evaluation_that_was_written_before_its_run_ended_has_one_line(ranks, small_config, monkeypatch):
    config = small_config.changed(evaluate_every=2, checkpoint_every=2, **EVALUATED)
    write = MetricsLog.write_evaluation

    def written_at_the_end(*arguments):
        write(*arguments)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write_evaluation", written_at_the_end)
        with pytest.raises(ZeroDivisionError):
            train(config, ranks)
    (first,) = evaluations(config.output)
    assert train(config.changed(steps=4), ranks) == 0
    assert [line["step"] for line in evaluations(config.output)] == [2, 4]
    assert evaluations(config.output)[0] == first
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]


def test_an_evaluation_is_the_same_each_time_and_is_of_the_average_unless_it_is_not_wanted(ranks, small_config):
    for judge_ema, file in ((None, EMA_FILE), (False, WEIGHTS_FILE)):
        config = small_config.changed(
            evaluate_every=6, judge_ema=judge_ema, output=small_config.output / file, lr=1e-2, **EVALUATED
        )
        train(config, ranks)
        run = check_run(config, ranks)
        samples = FixedSamples.open(config, 3, held_out=True)
        model = build_model(run.model_config, config)
        model.load_state_dict(load_file(list_checkpoints(config.output)[-1] / file))
        values = Evaluation(samples, run.objective, ranks, num_levels=2).losses(model.eval(), model)
        (line,) = evaluations(config.output)
        assert values == pytest.approx({name: value for name, value in line.items() if name != "step"})


def test_held_out_samples_are_none_that_a_run_trains_on(ranks, small_config):
    config = small_config.changed(holdout="40%")
    train_index = check_run(config, ranks).index
    held = FixedSamples.open(config, 99, held_out=True)
    rest = FixedSamples.open(config, 99, held_out=False)
    names = {side: {batch.samples[0] for batch in s.read(range(s.number))} for side, s in (("a", held), ("b", rest))}
    assert len(names["a"]) == held.number == 9 - train_index.num_samples
    assert len(names["b"]) == train_index.num_samples
    assert not names["a"] & names["b"]


def test_a_run_is_not_judged_on_sizes_that_it_does_not_train_on(ranks, small_config, tmp_path):
    write_cache(tmp_path / "cache", {Bucket(2, 32, 32): 40})
    write_cache(tmp_path / "cache", {Bucket(3, 32, 48): 1}, seed=1)
    config = small_config.changed(cache=str(tmp_path / "cache"), buckets=("3x32x48",), batch_size=1, holdout="10%")
    with pytest.raises(InputError, match=r"holdout=10%: no sample of 3x32x48 is held out, but of 2x32x32: hold out"):
        train(config.changed(evaluate_every=1), ranks)


@pytest.fixture
def fake_encoders(monkeypatch):
    use_fake_encoders(monkeypatch)


@pytest.mark.usefixtures("fake_encoders")
def test_previews_of_the_caches_captions_and_of_a_file_of_prompts_play(ranks, small_config, tmp_path):
    common = {"preview_every": 4, "preview_sampling_steps": 2, "preview_guidance": 1.5}
    config = small_config.changed(previews=2, tensorboard=True, **common)
    train(config, ranks)
    folders = sorted(folder.name for folder in (config.output / "previews").iterdir())
    assert folders == ["step-00000004", "step-00000006"]
    files = [sorted(file.name for file in (config.output / "previews" / name).iterdir()) for name in folders]
    assert files[0] == files[1]
    assert len(files[0]) == 2
    assert all("told-in-way-0" in name and name.endswith(".mp4") for name in files[0])
    with av.open(str(config.output / "previews" / folders[0] / files[0][0])) as container:
        assert sum(1 for _ in container.decode(container.streams.video[0])) == 2
    events = b"".join(file.read_bytes() for file in (config.output / "tensorboard").iterdir())
    assert b"previews/" in events

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a whale\n# no prompt\na red ball\n")
    config = small_config.changed(preview_prompts=prompts, output=tmp_path / "asked", **common)
    train(config, ranks)
    found = {file.name for file in (config.output / "previews" / "step-00000006").iterdir()}
    assert found == {file_stem(text, 0) + ".mp4" for text in ("a whale", "a red ball")}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"evaluate_every": 5}, "evaluate_every needs samples that are kept out of training: use --holdout"),
        ({"evaluate_levels": 9}, "do nothing without --evaluate-every"),
        ({"preview_guidance": 2.0}, "options of previews do nothing without --preview-every"),
        ({"judge_ema": True}, "judge_ema does nothing without --evaluate-every or --preview-every"),
        ({"judge_ema": True, "preview_every": 1, "ema_decay": None}, "there is no average with --ema-decay None"),
    ],
)
def test_options_without_effect_are_refused(small_config, changes, complaint):
    with pytest.raises(InputError, match=complaint):
        small_config.changed(**changes)


def test_previews_of_a_cache_whose_encoders_are_not_there_are_refused_at_the_start(ranks, small_config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a whale\n")
    with pytest.raises(InputError, match="none"):
        train(small_config.changed(preview_every=2, preview_prompts=prompts), ranks)
    with pytest.raises(InputError, match="VAE 'none'|model 'none'"):
        train(small_config.changed(preview_every=2, output=tmp_path / "captions"), ranks)
    assert not (tmp_path / "captions").exists()
    with pytest.raises(InputError, match="use --preview-guidance 1"):
        train(small_config.changed(preview_every=2, caption_dropout=0.0, output=tmp_path / "other"), ranks)
    shared = write_cache(tmp_path / "one", {next(iter(BUCKETS)): 1})
    with pytest.raises(InputError, match="no sample is held out"):
        train(small_config.changed(cache=shared.url, holdout="1%", evaluate_every=1, output=tmp_path / "none"), ranks)
