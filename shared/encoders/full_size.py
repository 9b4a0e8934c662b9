"""T5-XXL and SD's autoencoder at their real sizes with random weights, for measuring without a download."""

from pathlib import Path

import diffusers
import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from shared.encoders.architectures import ARCHITECTURES
from shared.encoders.location import DEMO_PREFIX, locate
from shared.encoders.measure_rates import T5_XXL


def write_t5_xxl(folder: Path) -> None:
    """Writes T5 v1.1 XXL's encoder, bfloat16, 9.5 GB, with the demo's tokenizer, whose tokens it has too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            T5EncoderModel(T5Config(**T5_XXL)).save_pretrained(folder)
    finally:
        torch.set_default_dtype(dtype)
    AutoTokenizer.from_pretrained(locate(f"{DEMO_PREFIX}t5")).save_pretrained(folder)


def write_sd_vae(folder: Path) -> None:
    """Writes an autoencoder of Stable Diffusion's architecture."""
    architecture = ARCHITECTURES["sd"]
    getattr(diffusers, architecture.class_name)(**architecture.config).save_pretrained(folder)
