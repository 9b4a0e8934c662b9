"""STDiT and STDiT3 against tensors computed by the published Open-Sora v1.0 and v1.2 models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from train.model import create_model
from train.model.checkpointing import ACTIVATION_CHECKPOINTING
from train.model.positions import rotary_frequencies, spatial_positions, temporal_positions
from train.model.transformer import DiffusionTransformer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FILES = {"stdit-xl/2": "stdit_v1_square.safetensors", "stdit3-xl/2": "stdit3_square.safetensors"}
NUM_GRADIENTS = {"stdit-xl/2": 29, "stdit3-xl/2": 48}
INPUTS = ("timestep", "y", "mask", "fps", "height", "width")


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    with safe_open(GOLDEN / FILES[name], "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        return tensors, {key: json.loads(value) for key, value in file.metadata().items()}


def golden_model(
    name: str, tensors: dict[str, torch.Tensor], config: dict[str, object], **options: object
) -> DiffusionTransformer:
    model = create_model(name, **config, **options)
    model.load_state_dict({k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")})
    return model


@pytest.mark.parametrize("activation_checkpointing", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("backend", [None, "flash", "math"])
@pytest.mark.parametrize("name", FILES)
def test_output_and_gradients_agree_with_the_published_model(name, backend, activation_checkpointing):
    tensors, config = load_golden(name)
    model = golden_model(
        name, tensors, config, attention_backend=backend, activation_checkpointing=activation_checkpointing
    )
    x = tensors["input/x"].requires_grad_()
    output = model(x, **{key: tensors[f"input/{key}"] for key in INPUTS if f"input/{key}" in tensors})
    torch.testing.assert_close(output, tensors["output"], atol=1e-4, rtol=1e-4)
    output.square().mean().backward()
    gradients = {"x": x.grad} | {key: p.grad for key, p in model.named_parameters()}
    checked = [key for key in tensors if key.startswith("grad/")]
    assert len(checked) == NUM_GRADIENTS[name]
    for key in checked:
        torch.testing.assert_close(gradients[key.removeprefix("grad/")], tensors[key], atol=1e-4, rtol=1e-4)


def test_positions_agree_with_the_published_buffers():
    tensors, config = load_golden("stdit-xl/2")
    frames, rows, columns = (n // p for n, p in zip(config["input_size"], config["patch_size"], strict=True))
    cpu = torch.device("cpu")
    space = spatial_positions(config["hidden_size"], rows, columns, config["space_scale"], cpu)
    time = temporal_positions(config["hidden_size"], frames, config["time_scale"], cpu)
    torch.testing.assert_close(space, tensors["state/pos_embed"], atol=1e-6, rtol=0)
    torch.testing.assert_close(time, tensors["state/pos_embed_temporal"], atol=1e-6, rtol=0)


def test_rotary_frequencies_agree_with_the_published_ones():
    tensors, config = load_golden("stdit3-xl/2")
    frequencies = rotary_frequencies(config["hidden_size"] // config["num_heads"])
    torch.testing.assert_close(frequencies, tensors["state/rope.freqs"], atol=0, rtol=1e-6)
