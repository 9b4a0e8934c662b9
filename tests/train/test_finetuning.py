"""Beginning with weights that are there, low-rank additions, and writing weights for others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import InputError
from tests.train.conftest import BUCKETS
from tests.train.synthetic_cache import TEXT_CHANNELS, write_cache
from train.building import begin_with, build_model
from train.checkpoint_files import EMA_FILE, WEIGHTS_FILE, list_checkpoints
from train.config import FinetuningOptions
from train.export import ExportConfig, export
from train.lora import merged_state, scale_of
from train.run_folder import read_run
from train.run_weights import load_run_model
from train.setup import check_run
from train.trainer import train


@pytest.fixture
def trained(ranks, small_config):
    """A run whose weights are not those of its beginning."""
    config = small_config.changed(steps=3, lr=1e-2, precision="float32", output=small_config.output.with_name("first"))
    train(config, ranks)
    return config


def output_of(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 2, 4, 4, generator=generator)
    y = torch.randn(2, 1, 6, TEXT_CHANNELS, generator=generator)
    with torch.no_grad():
        return model.eval()(x, torch.tensor([3.0, 700.0]), y)


def exported(config, folder, **options):
    assert export(ExportConfig(run=config.output, output=folder, **options)) == 0
    return folder / "model.safetensors"


@pytest.mark.parametrize("ema", [True, False])
def test_an_exported_file_begins_a_run_that_computes_the_same(ranks, trained, small_config, tmp_path, ema):
    file = exported(trained, tmp_path / "out", ema=ema)
    (usual := tmp_path / "usual").touch()
    assert file.stat().st_mode == usual.stat().st_mode, "readable for whom the umask lets"
    names = load_file(file).keys()
    assert {"pos_embed", "pos_embed_temporal", "y_embedder.y_embedding"} <= names
    run = check_run(small_config, ranks)
    begun = build_model(run.model_config, small_config)
    report = begin_with(begun, FinetuningOptions(init_from=str(file)), run.index.provenance)
    assert "tensors loaded" in report.line()
    saved = list_checkpoints(trained.output)[-1] / (WEIGHTS_FILE if ema is False else EMA_FILE)
    expected = output_of(load_run_model(read_run(trained.output), saved))
    assert torch.equal(output_of(begun), expected)
    other = load_run_model(read_run(trained.output), saved.with_name(EMA_FILE if ema is False else WEIGHTS_FILE))
    assert not torch.equal(output_of(other), expected)


def test_a_run_begins_with_the_average_of_another_and_goes_on_without_it(ranks, trained, small_config, tmp_path):
    config = small_config.changed(init_from=str(trained.output), steps=1, lr=1e-9, precision="float32")
    train(config, ranks)
    begun = load_file(list_checkpoints(config.output)[-1] / WEIGHTS_FILE)
    average = load_file(list_checkpoints(trained.output)[-1] / EMA_FILE)
    for name, value in average.items():
        torch.testing.assert_close(begun[name], value, atol=1e-6, rtol=0)
    trained.output.rename(tmp_path / "moved")  # the weights that a run began with are in its checkpoints
    train(config.changed(steps=2), ranks)


def test_additions_alone_are_trained_merged_and_read_by_peft(ranks, trained, small_config, tmp_path):
    peft = pytest.importorskip("peft")
    config = small_config.changed(
        init_from=str(trained.output), lora_rank=2, lora_alpha=6.0, steps=3, lr=1e-2, precision="float32"
    )
    train(config.changed(steps=2), ranks)
    train(config, ranks)  # goes on from its checkpoint
    checkpoint = list_checkpoints(config.output)[-1]
    state = load_file(checkpoint / WEIGHTS_FILE)
    base = load_file(list_checkpoints(trained.output)[-1] / EMA_FILE)
    for name, value in state.items():
        if ".lora_" in name:
            assert value.abs().max() > 0, name
        else:
            torch.testing.assert_close(value, base[name.replace(".base_layer.", ".")], atol=0, rtol=0)
    targets = {name.split(".")[-4] for name in state if ".lora_A" in name}
    assert targets == {"qkv", "proj", "q_linear", "kv_linear", "fc1", "fc2"}
    assert not any(name.startswith(("y_embedder.y_proj.fc1.lora", "x_embedder.proj.lora")) for name in state)

    file = exported(config, tmp_path / "out", ema=False)
    merged = load_run_model(read_run(config.output), checkpoint / WEIGHTS_FILE)
    run = check_run(small_config.changed(output=tmp_path / "none"), ranks)
    begun = build_model(run.model_config, small_config)
    begin_with(begun, FinetuningOptions(init_from=str(file)), run.index.provenance)
    assert torch.equal(output_of(begun), output_of(merged))

    plain = load_run_model(read_run(trained.output), list_checkpoints(trained.output)[-1] / EMA_FILE)
    before = output_of(plain)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter")
    torch.testing.assert_close(output_of(adapted), output_of(merged), atol=1e-5, rtol=1e-4)
    assert (output_of(adapted) - before).abs().max() > 1e-3
    assert merged_state(state, scale_of(config.finetuning)).keys() == base.keys()


def test_additions_train_in_bfloat16_at_every_stage_and_frozen_modules_stay(ranks, trained, small_config):
    for stage in (0, 1, 2, 3):
        config = small_config.changed(
            output=small_config.output.with_name(f"lora{stage}"), init_from=str(trained.output), lora_rank=2
        ).changed(steps=2, zero_stage=stage)
        assert train(config, ranks) == 0
    config = small_config.changed(freeze=("y_embedder", "x_embedder"), steps=2, lr=1e-2, precision="float32")
    train(config, ranks)
    after = load_file(list_checkpoints(config.output)[-1] / WEIGHTS_FILE)
    torch.manual_seed(config.seed)
    before = build_model(check_run(config, ranks).model_config, config).state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"blocks", "t_embedder", "t_block", "final_layer"}


MODULES = ("x_embedder", "t_embedder", "t_block", "y_embedder", "blocks", "final_layer")
"""All of an STDiT's."""


def test_weights_that_do_not_fit_are_told_in_one_line(ranks, trained, small_config, tmp_path):
    wide = write_cache(tmp_path / "wide", BUCKETS, latent_channels=4)
    file = exported(trained, tmp_path / "out")
    state = load_file(file)
    save_file(state | {"blocks.9.attn.qkv.weight": torch.zeros(1)}, tmp_path / "unknown.safetensors")
    save_file({k: v for k, v in state.items() if "fc1" not in k}, tmp_path / "lacking.safetensors")
    patches = torch.zeros(32, 16, 1, 2, 2)
    save_file(state | {"x_embedder.proj.weight": patches}, tmp_path / "channels.safetensors")
    cases = [
        ({"init_from": str(tmp_path / "unknown.safetensors")}, "not in the model: blocks.9.attn.qkv.weight"),
        ({"init_from": str(tmp_path / "lacking.safetensors")}, "not in the file: "),
        ({"init_from": str(tmp_path / "channels.safetensors")}, "latents of 16 channels, the model for 4"),
        ({"init_from": str(tmp_path / "nowhere.pth")}, "no such file or folder"),
        ({"init_from": str(file), "reinit": ("nothing",)}, "reinit='nothing': the model has no such module"),
        ({"freeze": ("nothing",)}, "freeze=nothing: the model has no such module: choose from"),
        ({"freeze": MODULES}, "freeze=x_embedder .*: nothing is left to train: name fewer modules"),
    ]
    for changes, complaint in cases:
        with pytest.raises(InputError, match=complaint) as raised:
            train(small_config.changed(**changes, cache=wide.url), ranks)
        assert "\n" not in str(raised.value)
        assert not small_config.output.exists()


def test_a_run_of_another_autoencoder_begins_none_unless_its_layers_begin_anew(ranks, trained, small_config):
    description = json.loads((trained.output / "run.json").read_text())
    description["provenance"]["latent"]["weights_sha256"] = "another autoencoder's"
    (trained.output / "run.json").write_text(json.dumps(description))
    config = small_config.changed(init_from=str(trained.output), steps=1)
    with pytest.raises(InputError, match=r"was trained on latent of weights_sha256=another autoencoder's.*--reinit x_"):
        train(config, ranks)
    assert (
        train(config.changed(reinit=("x_embedder", "final_layer"), output=config.output.with_name("anew")), ranks) == 0
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"reinit": ("x_embedder",)}, "reinit=x_embedder does nothing without --init-from"),
        ({"lora_alpha": 3.0}, "lora_alpha and lora_targets do nothing without --lora-rank"),
        ({"lora_rank": 4}, "additions to random weights learn nothing: use --init-from"),
        ({"lora_rank": 4, "init_from": "w", "freeze": ("x",)}, "leave --freeze and --reinit out"),
        ({"lora_rank": 4, "init_from": "w", "lora_targets": ("x_embedder",)}, "lora_targets=x_embedder: choose from"),
    ],
)
def test_options_that_do_not_fit_are_refused(small_config, changes, complaint):
    with pytest.raises(InputError, match=complaint):
        small_config.changed(**changes)


def test_nothing_is_exported_over_what_is_there(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already: expected a new or empty folder"):
        export(ExportConfig(run=trained.output, output=tmp_path))
    with pytest.raises(InputError, match="no such file: expected a checkpoint of this run, or --no-ema"):
        export(ExportConfig(run=trained.output, output=tmp_path / "o", checkpoint=tmp_path, ema=True))
    with pytest.raises(InputError, match=r"mine.txt/out: file exists while writing weights to"):
        export(ExportConfig(run=trained.output, output=tmp_path / "mine.txt" / "out"))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="a checkpoint of another run than"):
        export(ExportConfig(run=trained.output, output=tmp_path / "o", checkpoint=tmp_path, ema=True))


def test_weights_that_a_run_began_with_may_be_moved_once_it_has_a_checkpoint(ranks, small_config, trained, capsys):
    config = small_config.changed(init_from=str(trained.output), steps=1, checkpoint_every=1)
    train(config, ranks)
    moved = config.changed(init_from="/moved", steps=2)
    assert train(moved, ranks) == 0
    assert "--init-from /moved: not read, the run goes on from its checkpoint" in capsys.readouterr().out
    assert train(config.changed(init_from=None, steps=3), ranks) == 0
    shutil.rmtree(config.output / "checkpoints")
    with pytest.raises(InputError, match="the run there has init_from=.*, this one has init_from=/moved"):
        train(moved, ranks)
