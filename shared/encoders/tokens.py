"""Counting the tokens of captions, with the tokenizer alone."""

from collections.abc import Sequence

import transformers
from transformers import AutoTokenizer

from shared.encoders.captions import Cleaning, clean_caption
from shared.encoders.location import locate
from shared.errors import InputError


def count_tokens(captions: Sequence[str], model: str, *, max_tokens: int, cleaning: Cleaning) -> list[int]:
    """Returns how many tokens of each caption are stored, the end token included; 0 where cleaning leaves nothing.

    Args:
        captions: As the manifest gives them.
        model: Hub id or folder of a text encoder or of its tokenizer alone.
        max_tokens: Longer captions are cut.
        cleaning: As the text encoder will see them.

    Raises:
        InputError: if there is no such tokenizer.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(model))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"tokenizer {model!r}: not loadable ({error}): expected a T5's folder or hub id") from None
    cleaned = [clean_caption(caption, cleaning) for caption in captions]
    if not cleaned:
        return []
    tokens = tokenizer(cleaned, truncation=True, max_length=max_tokens)["input_ids"]
    return [len(ids) if caption else 0 for ids, caption in zip(tokens, cleaned, strict=True)]
