"""Caption cleaning."""

import random
import time

import pytest

from shared.encoders import captions
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


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a <![ x", "a <! x"),
        ("a <![ red> fire &lt;3 <b>fox</b>", "a fire <3 fox"),
        ("one\udfff &#43; dog", "one\ufffd dog"),
        (f"a &#{'9' * 5000}; dog", "a \ufffd dog"),
        ("<b>" * 1500 + "dog", "dog"),
    ],
)
def test_what_the_parser_rejects_is_cleaned_without_it(caption: str, cleaned: str) -> None:
    assert clean_caption(caption, "deepfloyd") == cleaned


def test_no_caption_fails() -> None:
    chance = random.Random(0)
    pieces = [
        "<",
        "<!",
        "<![",
        "<!--",
        "<?",
        "</",
        ">",
        "]]>",
        "<script>",
        "<a ",
        "='",
        '"',
        "&",
        "&#",
        "&#xd800;",
        ";",
    ]
    pieces += ["%", "%3c", "\x00", "\x85", "\ud83d", "\ude00", "\u0130", "a", "1", ".com", "https:", "@", " ", "\n"]
    for _ in range(500):
        caption = "".join(chance.choices([*pieces, chr(chance.randrange(0x110000))], k=chance.randrange(1, 40)))
        clean_caption(caption, "deepfloyd").encode()


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a.b.comx/y@z see", "y see"),
        ("a.b-c.https://x.y/z and 1.http: d", "a. b-c. x. y z and 1.http: d"),
        ("_a.com@b x.com-a@c", "a. com a"),
        ("a.png.pngx b .png", "x b ."),
        ("a  .  b . c", "a b c"),
        ("2x3.5a 10.5x20. 7x8. 1x2x3", ".5a 10 ."),
        ("a1b2c\u00e9 1a2b33 a1b2", "a1b2c\u00e9"),
    ],
)
def test_bounded_rules_match_what_the_published_ones_match(caption: str, cleaned: str) -> None:
    assert clean_caption(caption, "deepfloyd") == cleaned


def test_time_grows_with_the_length_of_a_caption_and_not_with_its_square() -> None:
    unkind = ["a.b", "x.co@", "-.", "1a.", " ", "&#9", "<a ", "<a b='"]
    unkind_captions = [(piece * 5000)[:4999] + end for piece in unkind for end in ("x", "\u00e9")]
    unkind_captions += ["a1a" + "1" * 4990 + "\u00e9", "1" * 4990 + "\u00e9"]
    begin = time.process_time()
    for caption in unkind_captions:
        clean_caption(caption, "deepfloyd")
    assert time.process_time() - begin < 1.5


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_rules_that_are_passed_over_would_have_found_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of pieces that rules look for, cleaned with every rule and every repair, and by the short way."""
    chance = random.Random(1)
    pieces = ["a", "fox", "Two", "3", "12", "123", "1234567", "x", "\u00d7", ".", "..", ",", "-", "--", "_", ":", " : "]
    pieces += [
        " ",
        " ",
        " ",
        "  ",
        "\n",
        "\t",
        "\x1b[0m",
        "\x00",
        "\u00a0",
        "\u2003",
        "'",
        '"',
        "`",
        "\u2019",
        "\u201c",
    ]
    pieces += ["<person>", "http://", "https:", "http:a", "www:", "www.", "a.co", ".com", ".ru", "@", "@me", "#", "#12"]
    pieces += ["&", "&quot", "&quot;", "&amp;", "&amp;lt;", "&#39;", "1.2.3.4", "7:15 ", "\\n", ".png", "jpg images"]
    pieces += [
        "free ",
        "shipping",
        "worldwide ",
        "download",
        "click for ",
        "page ",
        "4k",
        "a1b2",
        "10x20",
        "1.5x2",
        "+",
    ]
    pieces += [
        "\ufb01",
        "\uff21",
        "\u4e00",
        "\u00e9",
        "e\u0301",
        "\u0663",
        "\u0130",
        "\u00c3\u00a9",
        "\ud83d",
        "%20",
        "/",
    ]
    every = [
        "".join(chance.choices(pieces, k=chance.randrange(1, 14))) + chance.choice(["", "", *pieces])
        for _ in range(2_000)
    ]
    short = [clean_caption(caption, "deepfloyd") for caption in every]

    def substitute(text: str, rules: list[captions.Rule]) -> str:
        for pattern, replacement, _ in rules:
            text = pattern.sub(replacement, text)
        return text

    monkeypatch.setattr(captions, "_substitute", substitute)
    monkeypatch.setattr(captions, "_is_plain", lambda text: False)
    assert short == [clean_caption(caption, "deepfloyd") for caption in every]
