"""Caption cleaning."""

import pytest

from shared.encoders.captions import clean_caption


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("  A Dog runs.  ", "a dog runs."),
        ("It&#39;s raining", "it's raining"),
        ("see https://example.com/a/b now", "see now"),
        ("<b>Bold</b> red fox", "bold red fox"),
        ("a photo by @someone of a lake", "a photo by of a lake"),
        ("“curly” quotes", '"curly" quotes'),
        ("picture.jpg of a house", "of a house"),
        ("one,two", "one, two"),
        ("a-b_c-d_e", "a b c d e"),
        ("a ﬁne day", "a fine day"),
        ("snow 4k free download", "snow 4k"),
        ("犬 a dog", "a dog"),
        ("", ""),
    ],
)
def test_a_caption_is_cleaned_as_published(caption: str, cleaned: str) -> None:
    assert clean_caption(caption, "deepfloyd") == cleaned


def test_without_cleaning_only_white_space_goes() -> None:
    assert clean_caption("  A <b>Dog</b>\n", "none") == "A <b>Dog</b>"
