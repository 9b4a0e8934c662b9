"""Published weights: loaded by name and safely, refused in one line, written back as they were."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import InputError
from tests.train.small_models import inputs, small_model
from tests.train.test_golden import FILES, GOLDEN, load_golden
from train.model import build_model, create_model, weight_files
from train.model.published import load_state, load_weights, stdit3_config, write_published
from train.model.weight_files import read_weights

LABELS = "dit-ti/2 of labels"


def published_v1() -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Returns the state dict of the published code at a small size, and its settings."""
    tensors, config = load_golden("stdit-xl/2")
    return {name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")}, config


def pixart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict as PixArt-alpha has it: of images, with its own positions."""
    images = {name: t for name, t in state.items() if "attn_temp" not in name and "pos_embed" not in name}
    weight = "x_embedder.proj.weight"
    return images | {weight: images[weight].squeeze(2), "pos_embed": torch.zeros(1, 16, 48)}


@pytest.mark.parametrize("wrapped", ["", "ema", "model", "state_dict", "module."])
def test_a_v1_file_loads_by_name_however_it_is_wrapped(tmp_path, wrapped):
    state, config = published_v1()
    noise = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    saved = {
        "": state,
        "ema": {"model": noise, "ema": state, "step": 7},
        "model": {"model": state, "epoch": 1},
        "state_dict": {"state_dict": state},
        "module.": {f"module.{name}": tensor for name, tensor in state.items()},
    }[wrapped]
    torch.save(saved, tmp_path / "v1.pth")
    model = create_model("stdit-xl/2", **config)
    report = load_weights(model, tmp_path / "v1.pth")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert report.loaded == len(state) - 2  # the positions are made anew
    assert report.as_initialised == report.reinitialised == ()


def test_a_file_in_the_older_format_loads_too(tmp_path):
    state, config = published_v1()
    torch.save(state, tmp_path / "v1.pth", _use_new_zipfile_serialization=False)
    assert load_weights(create_model("stdit-xl/2", **config), tmp_path / "v1.pth").loaded == len(state) - 2


@pytest.mark.parametrize("file", ["back.safetensors", "back.pth"])
def test_v1_weights_are_written_back_as_they_were(tmp_path, file):
    state, config = published_v1()
    model = create_model("stdit-xl/2", **config)
    model.load_state_dict(state)
    write_published(tmp_path / file, model.config, model.state_dict())
    written = read_weights(tmp_path / file).tensors
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(written[name], tensor, atol=1e-6 if "pos_embed" in name else 0, rtol=0)


def test_stdit3_weights_are_written_as_the_published_folder_and_come_back(tmp_path):
    tensors, config = load_golden("stdit3-xl/2")
    state = {name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")}
    model = create_model("stdit3-xl/2", **config)
    model.load_state_dict(state)
    write_published(tmp_path / "stdit3", model.config, model.state_dict())
    written = load_file(tmp_path / "stdit3" / "model.safetensors")
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(written[name], tensor, atol=0, rtol=1e-6 if name == "rope.freqs" else 0)
    values = json.loads((tmp_path / "stdit3" / "config.json").read_text())
    assert values["model_type"] == "STDiT3"
    assert values["input_size"] == [None, None, None]

    file = read_weights(tmp_path / "stdit3")
    back = build_model(stdit3_config(file))
    load_state(back, file)
    assert back.config == model.config
    x = {name.removeprefix("input/"): tensor for name, tensor in tensors.items() if name.startswith("input/")}
    torch.testing.assert_close(back(**x), tensors["output"], atol=1e-4, rtol=1e-4)


def test_a_published_config_without_qk_norm_has_none_and_what_only_upstream_knows_is_passed_over(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "STDiT3", "hidden_size": 48, "num_heads": 2, "depth": 1, "enable_flash_attn": True})
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = stdit3_config(read_weights(tmp_path))
    assert (config.hidden_size, config.depth, config.qk_norm, config.model_max_length) == (48, 1, False, 300)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="no config.json of an STDiT3: name the model"):
        stdit3_config(read_weights(tmp_path))


def test_pixart_starts_an_stdit_and_what_it_lacks_is_listed_and_stays_as_initialised(tmp_path):
    state, config = published_v1()
    torch.save({"state_dict": pixart(state)}, tmp_path / "pixart.pth")
    model = create_model("stdit-xl/2", **config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, tmp_path / "pixart.pth")
    after = model.state_dict()
    lacking = [f"blocks.{i}.attn_temp.{part}" for i in range(2) for part in ("qkv.weight", "qkv.bias", "proj.weight")]
    assert set(lacking) < set(report.as_initialised)
    assert len(report.as_initialised) == 8
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] if name in report.as_initialised else state[name]), name
    assert "blocks.0.attn_temp.qkv.weight" in report.line()
    assert "and 5 more not in the file: as initialised" in report.line()


def test_pixart_starts_a_dit_whole_and_both_models_start_as_the_same_model_of_images(tmp_path):
    state, config = published_v1()
    save_file(pixart(state), tmp_path / "pixart.safetensors")
    dit, stdit = (create_model(name, **config) for name in ("dit-xl/2", "stdit-xl/2"))
    assert load_weights(dit, tmp_path / "pixart.safetensors").as_initialised == ()
    load_weights(stdit, tmp_path / "pixart.safetensors")
    values = {"timestep": torch.tensor([7.0]), "y": torch.randn(1, 1, 5, 32)}
    x = torch.randn(1, 4, 3, 8, 8)
    frames = torch.cat([dit(x[:, :, i : i + 1], **values) for i in range(3)], dim=2)
    torch.testing.assert_close(stdit(x, **values), frames, atol=1e-5, rtol=1e-5)
    assert (dit(x, **values) - frames).abs().max() > 1e-3


def test_the_published_layout_of_images_with_labels_comes_back(tmp_path):
    model = small_model(LABELS, input_size=(1, 8, 12))
    write_published(tmp_path / "dit.pt", model.config, model.state_dict())
    written = read_weights(tmp_path / "dit.pt").tensors
    assert written["x_embedder.proj.weight"].shape == (48, 4, 2, 2)
    assert written["pos_embed"].shape == (1, 24, 48)
    other = create_model("dit-ti/2", **{f: getattr(model.config, f) for f in model.config.__dataclass_fields__})
    load_weights(other, tmp_path / "dit.pt")
    torch.testing.assert_close(other(**inputs(LABELS)), model(**inputs(LABELS)))


@pytest.mark.parametrize("kind", ["stdit-ti/2", "dit-ti/2"])
def test_layers_for_another_autoencoder_or_text_encoder_begin_anew_on_request_only(tmp_path, kind):
    source = small_model(kind)
    save_file(dict(source.state_dict()), tmp_path / "weights.safetensors")
    target = small_model(kind, in_channels=16, caption_channels=24)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_weights(target, tmp_path / "weights.safetensors")
    assert "weights of other shapes: " in str(error.value)
    assert "x_embedder.proj.weight [48, 4, 1, 2, 2], expected [48, 16, 1, 2, 2]" in str(error.value)
    assert "for latents of 4 channels, the model for 16" in str(error.value)
    assert "for captions of 16 channels, the model for 24" in str(error.value)

    anew = ("x_embedder", "final_layer", "y_embedder")
    report = load_weights(target, tmp_path / "weights.safetensors", reinit=anew)
    for name, tensor in target.state_dict().items():
        is_anew = name.split(".")[0] in anew
        assert (name in report.reinitialised) == is_anew
        assert torch.equal(tensor, before[name] if is_anew else source.state_dict()[name]), name
    with pytest.raises(InputError, match="reinit='x_embed': the model has no such module: choose from x_embedder, t_"):
        load_weights(target, tmp_path / "weights.safetensors", reinit=("x_embed",))


def test_weights_of_another_model_are_refused_in_one_line_with_the_first_names(tmp_path):
    state, config = published_v1()
    del state["t_block.1.bias"]
    save_file(state | {f"csize_embedder.{i}": torch.zeros(1) for i in range(5)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError) as error:
        load_weights(create_model("stdit-xl/2", **config), tmp_path / "other.safetensors")
    assert "other.safetensors: weights of another model than this STDiT: not in the file: t_block.1.bias; " in str(
        error.value
    )
    assert "not in the model: csize_embedder.0, csize_embedder.1, csize_embedder.2 and 2 more" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="weights of another model than this STDiT3: not in the file: .* and .* more"):
        load_weights(small_model("stdit3-ti/2"), tmp_path / "other.safetensors")
    wide, _ = published_v1()
    wide["t_block.1.bias"] = torch.zeros(289)
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"1 weight of other shapes: t_block.1.bias \[289\], expected \[288\]: choose"):
        load_weights(create_model("stdit-xl/2", **config), tmp_path / "wide.safetensors")


def test_rotary_frequencies_that_the_model_cannot_have_are_refused():
    tensors, config = load_golden("stdit3-xl/2")
    state = {name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")}
    with pytest.raises(InputError, match="rope.freqs: not the frequencies of theta 10,000"):
        create_model("stdit3-xl/2", **config).load_state_dict(state | {"rope.freqs": state["rope.freqs"] * 1.5})


class Harmful:
    """What a pickle may hold: a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_with_more_than_tensors_is_refused_and_runs_nothing(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "args": Harmful(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="bad.pth: holds Python objects besides tensors, which may run code"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "cut.pth").write_bytes((GOLDEN / FILES["stdit-xl/2"]).read_bytes()[:1000])
    (tmp_path / "cut.safetensors").write_bytes((GOLDEN / FILES["stdit-xl/2"]).read_bytes()[:1000])
    (tmp_path / "notes.txt").write_text("x")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    (tmp_path / "folder").mkdir()
    for name, content in (("binary", b"\xff\xfe"), ("list", b"[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(content)
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    for name, message in [
        ("binary", "config.json cannot be read"),
        ("list", "config.json cannot be read .it holds a list"),
        ("cut.safetensors", "not a readable file of weights"),
        ("cut.pth", "not a readable file of weights|holds Python objects"),
        ("notes.txt", "expected a file ending in .safetensors"),
        ("list.pt", "holds no tensors by name"),
        ("folder", "found no model.safetensors with config.json"),
        ("nothing.pth", "no such file or folder"),
    ]:
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path / name)
    with pytest.raises(InputError, match="x.txt: expected a file ending in .safetensors"):
        write_published(tmp_path / "x.txt", small_model("stdit-ti/2").config, small_model("stdit-ti/2").state_dict())


def test_repositories_are_named_by_owner_name_and_file(tmp_path, monkeypatch):
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        path = tmp_path / Path(file).name
        if path.suffix == ".json":
            path.write_text("{}")
        else:
            save_file({"a": torch.zeros(1)}, path)
        return str(path)

    monkeypatch.setattr(weight_files, "hf_hub_download", download)
    assert read_weights("owner/name/folder/v1.safetensors").config is None
    assert read_weights("owner/name").config == {}
    assert asked == [
        ("owner/name", "folder/v1.safetensors"),
        ("owner/name", "config.json"),
        ("owner/name", "model.safetensors"),
    ]
