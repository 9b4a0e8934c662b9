"""The width of a text encoder's embeddings, from its configuration alone."""

import transformers
from transformers import AutoConfig

from shared.encoders.location import locate
from shared.errors import InputError


def read_text_channels(model: str) -> int:
    """Returns the width D of a T5's embeddings, without loading weights.

    Args:
        model: Hub id, folder, or ``demo:t5``.

    Raises:
        InputError: if there is no such model.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        return int(AutoConfig.from_pretrained(locate(model)).d_model)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"text encoder {model!r}: no configuration found ({error}): expected a T5's folder or hub id"
        ) from None
