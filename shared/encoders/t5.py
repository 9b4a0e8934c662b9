"""T5 as a frozen text encoder: captions in, embeddings of their own tokens out, without padding."""

from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, T5EncoderModel

from shared.encoders.captions import Cleaning, clean_caption
from shared.encoders.fingerprint import weights_sha256
from shared.encoders.location import locate
from shared.errors import InputError


class TextEncoder:
    """A T5 encoder and its tokenizer. Build it with :meth:`load`."""

    def __init__(
        self, model: T5EncoderModel, tokenizer: Any, *, name: str, max_tokens: int, cleaning: Cleaning
    ) -> None:
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self.max_tokens, self.cleaning = max_tokens, cleaning
        self._weights_sha256 = weights_sha256(model)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 120,
        cleaning: Cleaning = "deepfloyd",
    ) -> "TextEncoder":
        """Loads a T5 encoder from a hub id (e.g. ``DeepFloyd/t5-v1_1-xxl``) or a local folder.

        Args:
            model: Hub id, folder, or ``demo:t5``.
            device: Where it runs.
            dtype: Type of its weights and activations.
            max_tokens: Longer captions are cut, as in training of the published models.
            cleaning: See ``shared.encoders.captions``.

        Raises:
            InputError: if there is no such model, or it is not a T5 encoder with its tokenizer.
        """
        source = locate(model)
        transformers.utils.logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            parts: Any = T5EncoderModel.from_pretrained(source, dtype="auto", output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"text encoder {model!r}: not loadable ({error}): expected a T5 with its tokenizer"
            ) from None
        encoder, found = parts
        if lacking := [*found["missing_keys"], *found["mismatched_keys"]]:
            raise InputError(
                f"text encoder {model!r}: {len(lacking)} weights are missing or of another shape, e.g. {lacking[0]}: "
                "expected a T5 v1.1 encoder"
            )
        encoder.eval().requires_grad_(False)
        loaded = cls(encoder, tokenizer, name=model, max_tokens=max_tokens, cleaning=cleaning)
        torch.nn.Module.to(encoder, device, dtype)
        return loaded

    @property
    def channels(self) -> int:
        """Width D of the embeddings."""
        return int(self._model.config.d_model)

    def clean(self, caption: str) -> str:
        """Returns the caption as this encoder sees it."""
        return clean_caption(caption, self.cleaning)

    def provenance(self) -> dict[str, Any]:
        """Returns what decides the embeddings, for ``dataset.json``."""
        return {
            "model": self._name,
            "model_class": type(self._model).__name__,
            "weights_sha256": self._weights_sha256,
            "precision": str(self._model.dtype).removeprefix("torch."),
            "text_channels": self.channels,
            "max_tokens": self.max_tokens,
            "cleaning": self.cleaning,
        }

    @torch.inference_mode()
    def encode(self, captions: list[str], *, batch_size: int = 64) -> list[torch.Tensor]:
        """Returns the embeddings (L, D) of each caption's own tokens, the end token included, on this device.

        Equal captions are encoded once. Captions of one length share a batch, so nothing is ever padded.

        Args:
            captions: As the manifest gives them; cleaned here.
            batch_size: Captions a forward pass.
        """
        cleaned = [self.clean(caption) for caption in captions]
        distinct = sorted(set(cleaned))
        tokens = self._tokenizer(distinct, truncation=True, max_length=self.max_tokens)["input_ids"] if distinct else []
        by_length: dict[int, list[int]] = {}
        for position, ids in enumerate(tokens):
            by_length.setdefault(len(ids), []).append(position)
        embeddings: dict[str, torch.Tensor] = {}
        for positions in by_length.values():
            for start in range(0, len(positions), batch_size):
                batch = positions[start : start + batch_size]
                ids = torch.tensor([tokens[position] for position in batch], device=self._model.device)
                hidden = self._model(input_ids=ids).last_hidden_state
                embeddings.update((distinct[position], row) for position, row in zip(batch, hidden, strict=True))
        return [embeddings[caption] for caption in cleaned]


VERSIONS = {"transformers": transformers.__version__}
"""Recorded beside every shard."""
