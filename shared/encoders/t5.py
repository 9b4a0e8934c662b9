"""T5 as a frozen text encoder: captions in, embeddings of their own tokens out, without padding."""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from shared.encoders.captions import Cleaning, clean_caption
from shared.encoders.fast_t5 import FastT5, Packed, pack, why_not
from shared.encoders.fingerprint import WeightFiles, known_weights_sha256
from shared.encoders.location import locate
from shared.errors import InputError
from shared.wording import counted

BATCH_TOKENS = {"cuda": 16_384, "cpu": 2_048}
"""Most tokens a forward pass, by kind of device. Part of what decides the bytes of embeddings."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Captions as token ids: all that encoding them asks of the CPU."""

    tokens: tuple[list[int], ...]
    """Of each distinct caption, sorted by length."""
    places: tuple[int, ...]
    """Where in ``tokens`` each caption is."""


class TextEncoder:
    """A T5 encoder and its tokenizer. Build it with :meth:`load`."""

    measure: Callable[[], AbstractContextManager[None]]
    """Entered around the kernels of each batch, e.g. to time them; by default it does nothing."""
    num_tokens: int
    """Tokens that went through the model so far, without padding: equal captions of one call count once."""
    halved: bool
    """The memory did not hold the batches of the last call: other batches, and so other last bits, came out of it."""

    def __init__(
        self,
        model: T5EncoderModel,
        tokenizer: Any,
        *,
        name: str,
        weights: str,
        max_tokens: int,
        cleaning: Cleaning,
        faster: bool = True,
    ) -> None:
        self._model, self._tokenizer, self._name, self._weights_sha256 = model, tokenizer, name, weights
        self._tokenizing = threading.Lock()
        self.max_tokens, self.cleaning = max_tokens, cleaning
        self.measure, self.num_tokens, self.halved = contextlib.nullcontext, 0, False
        self._fast: FastT5 | None = None
        self._padded = not faster
        if not faster:
            return
        if reason := why_not(model):
            _log.warning("text encoder %r: slow forward of transformers: %s", name, reason)
        else:
            self._fast = FastT5(model, max_tokens=max_tokens)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 120,
        cleaning: Cleaning = "deepfloyd",
        faster: bool = True,
    ) -> "TextEncoder":
        """Loads a T5 encoder from a hub id (e.g. ``DeepFloyd/t5-v1_1-xxl``) or a local folder.

        Args:
            model: Hub id, folder, or ``demo:t5``.
            device: Where it runs.
            dtype: Type of its weights and activations.
            max_tokens: Longer captions are cut, as in training of the published models.
            cleaning: See ``shared.encoders.captions``.
            faster: Without padding, by kernels of our own where there are some; else as in the published models' code:
                transformers' forward over captions that are padded to ``max_tokens``.

        Raises:
            InputError: if there is no such model, or it is not a T5 encoder with its tokenizer.
        """
        source = locate(model)
        transformers.utils.logging.disable_progress_bar()
        files = WeightFiles.of(model)
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
                f"text encoder {model!r}: {counted(len(lacking), 'weight')} missing or of another shape, e.g. "
                f"{lacking[0]}: expected a T5 v1.1 encoder"
            )
        encoder.eval().requires_grad_(False)
        weights = known_weights_sha256(encoder, model, files, {"transformers": transformers.__version__})
        torch.nn.Module.to(encoder, device, dtype)
        return cls(
            encoder,
            tokenizer,
            name=model,
            weights=weights,
            max_tokens=max_tokens,
            cleaning=cleaning,
            faster=faster,
        )

    @property
    def forward(self) -> str:
        """What computes the embeddings: ``triton``, ``torch``, ``padded``, or ``transformers`` for models unknown to
        FastT5."""
        if self._padded:
            return "padded"
        if self._fast is None:
            return "transformers"
        return "triton" if self._fast.uses_triton else "torch"

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
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Returns the embeddings (L, D) of each caption's own tokens, the end token included, on this device.

        Equal captions are encoded once. Batches, and so the last bits, depend on the set of captions alone, not on
        their order. Nothing waits for the GPU: the embeddings are views of what it will have computed. If its memory
        does not suffice, batches are halved for the rest of the call, and ``halved`` says so.

        Args:
            captions: As the manifest gives them; cleaned here.
        """
        return self.encode_prepared(self.prepare(captions))

    def prepare(self, captions: Sequence[str]) -> Prepared:
        """Cleans and tokenises captions; in another thread, it may run while the GPU is at work."""
        cleaned = [self.clean(caption) for caption in captions]
        distinct = list(set(cleaned))
        tokens = self.tokenize(distinct) if distinct else []
        in_order = sorted(zip(distinct, tokens, strict=True), key=lambda pair: (len(pair[1]), pair[0]))
        places = {caption: place for place, (caption, _) in enumerate(in_order)}
        return Prepared(tokens=tuple(ids for _, ids in in_order), places=tuple(places[caption] for caption in cleaned))

    def encode_prepared(self, captions: Prepared) -> list[Tensor]:
        """As :meth:`encode`."""
        embeddings = self.embed(captions.tokens) if captions.tokens else []
        return [embeddings[place] for place in captions.places]

    def tokenize(self, cleaned: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of cleaned captions, cut to the limit, the end token included."""
        with self._tokenizing:
            found = self._tokenizer(list(cleaned), truncation=True, max_length=self.max_tokens)
        ids: list[list[int]] = found["input_ids"]
        return ids

    @torch.inference_mode()
    def embed(self, tokens: Sequence[list[int]]) -> list[Tensor]:
        """Returns the embeddings (L, D) of captions given as token ids, the end token included, sorted by length."""
        self.halved = False
        return self._in_batches(tokens, BATCH_TOKENS[self._model.device.type])

    def _in_batches(self, captions: Sequence[list[int]], most: int) -> list[Tensor]:
        """Returns the embeddings of token ids, sorted by length, in batches of about equally many tokens."""
        ends = np.cumsum([self.max_tokens if self._padded else len(ids) for ids in captions])
        num_batches = -(-int(ends[-1]) // most)
        borders = np.searchsorted(ends, np.arange(1, num_batches) * int(ends[-1]) / num_batches, side="right").tolist()
        found: list[Tensor] = []
        for start, end in zip([0, *borders], [*borders, len(captions)], strict=True):
            if start == end:
                continue
            try:
                found += self._batch(captions[start:end])
                continue
            except torch.OutOfMemoryError:
                if end - start == 1:
                    raise
            torch.cuda.empty_cache()
            self.halved = True
            tokens = sum(len(ids) for ids in captions[start:end])
            return found + self._in_batches(captions[start:], min(most, tokens) // 2)
        return found

    def _batch(self, captions: Sequence[list[int]]) -> list[Tensor]:
        if self._padded:
            return self._padded_batch(captions)
        batch = pack(captions, self._model.device)
        with self.measure():
            hidden = self._fast(batch) if self._fast is not None else self._by_transformers(batch)
        self.num_tokens += len(hidden)
        return list(hidden.split(batch.lengths))

    def _padded_batch(self, captions: Sequence[list[int]]) -> list[Tensor]:
        lengths = torch.tensor([len(ids) for ids in captions])
        mask = torch.arange(self.max_tokens) < lengths[:, None]
        ids = torch.zeros(len(captions), self.max_tokens, dtype=torch.int64)
        ids[mask] = torch.tensor([token for caption in captions for token in caption])
        device = self._model.device
        with self.measure():
            hidden = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        self.num_tokens += int(lengths.sum())
        return [row[:length] for row, length in zip(hidden, lengths.tolist(), strict=True)]

    def _by_transformers(self, batch: Packed) -> Tensor:
        """Returns the last hidden states (T, W) by transformers' own forward: captions of one length at a time."""
        counts = [(length, len(list(group))) for length, group in groupby(batch.lengths)]
        parts = batch.ids.split([length * count for length, count in counts])
        return torch.cat(
            [
                self._model(input_ids=ids.view(-1, length)).last_hidden_state.flatten(0, 1)
                for ids, (length, _) in zip(parts, counts, strict=True)
            ]
        )


VERSIONS = {"transformers": transformers.__version__, "t5_forward": 4}
"""Recorded beside every shard; ``t5_forward`` is counted up where embeddings come out of other batches or kernels."""
