"""The captions of clips, and the identities of their texts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shared.cache.identity import text_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """A caption as the manifest gives it, and the identity of its cleaned text."""

    caption: str
    id: str


def identify(captions: Iterable[str], clean: Callable[[str], str]) -> tuple[Caption, ...]:
    """Returns the captions of which cleaning leaves something, each distinct text once."""
    by_id: dict[str, str] = {}
    for caption in captions:
        if cleaned := clean(caption):
            by_id.setdefault(text_id(cleaned), caption)
    return tuple(Caption(caption=caption, id=identity) for identity, caption in by_id.items())
