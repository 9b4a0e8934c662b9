"""Make the demo's text encoder: a T5 v1.1 encoder of random weights with T5's real tokenizer.

    python -m shared.encoders.demo.make_t5 --tokenizer FOLDER_WITH_SPIECE_MODEL --output FOLDER

Random weights are enough to tell captions apart, which is all that overfitting a few clips asks of them: every token
keeps an embedding of its own, mixed with those of its caption.
"""

import json
import shutil
from pathlib import Path

import torch
import tyro
from transformers import T5Config, T5EncoderModel

VOCABULARY = 32_128
"""T5's 32,100 pieces, padded as in every published T5."""


def build_t5(seed: int) -> T5EncoderModel:
    """A T5 v1.1 encoder of width 32 with two layers and random weights."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        num_heads=2,
        num_layers=2,
        d_ff=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        # T5 draws queries so small that untrained attention is uniform: larger ones let word order and company matter.
        for block in model.encoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(4.0)
    return model


def main(tokenizer: Path, output: Path, seed: int = 0) -> None:
    """Write the model in float16 and the tokenizer.

    Args:
        tokenizer: folder with T5's `spiece.model`.
        output: folder for model and tokenizer, laid out as a T5 v1.1 repository is.
        seed: of the weights.
    """
    build_t5(seed).half().save_pretrained(output)
    shutil.copyfile(tokenizer / "spiece.model", output / "spiece.model")
    special_tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512, **special_tokens}
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (output / "special_tokens_map.json").write_text(json.dumps(special_tokens, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
