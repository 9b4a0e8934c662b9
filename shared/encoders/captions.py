"""Caption cleaning, as the captions of DeepFloyd IF, PixArt and Open-Sora were cleaned before T5.

The rules follow ``clean_caption`` of DeepFloyd IF (``deepfloyd_if/modules/t5.py``): text that T5 saw cleaned in
training of those models must be cleaned likewise, or published weights see captions that they do not know. Applied
twice, as there: one round can uncover what the next removes.
"""

import contextlib
import html
import re
import urllib.parse
import warnings
from collections.abc import Callable
from typing import Literal

import ftfy
from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
from bs4.exceptions import ParserRejectedMarkup

warnings.filterwarnings("ignore", category=MarkupResemblesLocatorWarning)  # a caption may be a URL or a file's name

Cleaning = Literal["deepfloyd", "none"]

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_BAD_PUNCTUATION = re.compile(r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+")

_NUMBERS = re.compile(r"&#[0-9]{1000,};?")  # no characters, and more digits than int() takes
_TAGS = re.compile(r"<[^<>]*+>")
_MOST_PARSED = 500_000
"""Brackets times characters: each ``<`` may cost the parser a look at all that follows."""


def _url(scheme: str) -> re.Pattern[str]:
    """Returns what matches a URL, or (group 1) a run of its characters that holds no domain.

    Where the first word of such a run begins no URL, its other words begin none: they are not tried, as that takes
    time that grows with the square of the run.
    """
    domain = rf"[a-z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b/?(?!@)"
    return re.compile(rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{domain}|((?:(?!\b{scheme}:)[a-z0-9.\-])++))")


Rule = tuple[re.Pattern[str], str, Callable[[str], object]]
"""A pattern, what takes its place, and whether a text may hold it: cheap, and true wherever the pattern is found. Most
captions need few rules."""


def _has(*parts: str) -> Callable[[str], object]:
    return lambda text: any(part in text for part in parts)


def _odd(*parts: str) -> Callable[[str], object]:
    """Whether a text has characters beyond ASCII, or one of these."""
    return lambda text: not text.isascii() or any(part in text for part in parts)


def _finds(pattern: str) -> Callable[[str], object]:
    """Cheap are patterns that begin with a character or a class: ``re`` looks for that first."""
    return re.compile(pattern).search


def _begins(first: str) -> Callable[[str], object]:
    return lambda text: text.startswith(tuple(first))


_has_domain = _finds(rf"\.(?:{_DOMAINS})")
_has_digit_and_letter = _finds(r"\d[a-zA-Z]")
_has_letter_and_digit = _finds(r"\d(?<=[a-zA-Z]\d)")
_has_numeral = _finds(r"\d{3}")
_FILE_TYPES = ("png", "jpg", "jpeg", "bmp", "webp", "eps", "pdf", "apk", "mp4")

# What is bounded here and not in the publication (``(?<!``, ``++``) matches the same in linear time.
_BEFORE_MARKUP: list[Rule] = [
    (re.compile(r"<person>"), "person", _has("<person>")),
    (_url("https?"), r"\1", lambda text: "http" in text or _has_domain(text)),
    (_url("www"), r"\1", lambda text: "www:" in text or _has_domain(text)),
]
_AFTER_MARKUP: list[Rule] = [
    (re.compile(r"@[\w\d]+\b"), "", _has("@")),  # nicknames
    (
        re.compile(r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+"),
        "",
        _odd(),
    ),
    (
        re.compile(
            "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
            "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+"
        ),
        "-",
        _odd("--"),
    ),
    (re.compile("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]"), '"', _odd("`")),
    (re.compile("[\u2018\u2019]"), "'", _odd()),
    (re.compile(r"&quot;?"), "", _has("&")),
    (re.compile(r"&amp"), "", _has("&")),
    (re.compile(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"), " ", _finds(r"\d\.\d")),  # IP addresses
    (re.compile(r"\d:\d\d\s+$"), "", _finds(r"\d:\d\d\s")),  # numbers of articles
    (re.compile(r"\\n"), " ", _has(r"\n")),
    (re.compile(r"#\d{1,3}\b"), "", _has("#")),
    (re.compile(r"#\d{5,}\b"), "", _has("#")),
    (re.compile(r"\b\d{6,}\b"), "", _has_numeral),
    (re.compile(rf"(?<!\S)\S+\.(?:{'|'.join(_FILE_TYPES)})"), "", _finds(rf"\.(?:{'|'.join(_FILE_TYPES)})")),
    (re.compile(r"[\"']{2,}"), '"', _finds(r"[\"']{2}")),
    (re.compile(r"\.{2,}"), " ", _has("..")),
    (_BAD_PUNCTUATION, " ", _BAD_PUNCTUATION.search),
    (re.compile(r"(?<!\s)\s++\.\s+"), " ", _finds(r"\.(?<=\s\.)\s")),
]
_MANY_DASHES = re.compile(r"[-_]")
_AFTER_REPAIR: list[Rule] = [
    (re.compile(r"\b[a-zA-Z]{1,3}\d{3,15}\b"), "", _has_numeral),  # codes of products
    (re.compile(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"), "", _has_letter_and_digit),
    (re.compile(r"\b\d+[a-zA-Z]+\d+\b"), "", _has_digit_and_letter),
    (re.compile(r"(worldwide\s+)?(free\s+)?shipping"), "", _has("shipping")),
    (re.compile(r"(free\s)?download(\sfree)?"), "", _has("download")),
    (re.compile(r"\bclick\b\s(?:for|on)\s\w+"), "", _has("click")),
    (re.compile(rf"\b(?:{'|'.join(_FILE_TYPES)})(\simages?)?"), "", _has(*_FILE_TYPES)),
    (re.compile(r"\bpage\s+\d+\b"), "", _has("page")),
    (re.compile(r"\b\d*+[a-zA-Z]++\d++[a-zA-Z]++\d[a-zA-Z\d]*+\b"), " ", _has_letter_and_digit),
    (
        re.compile("\\b\\d++(?:\\.\\d*+)?[x\u0445\u00d7]\\d++(?:\\.\\d*)?\\b"),
        "",
        _finds("\\d[.x\u0445\u00d7]"),
    ),  # sizes
    (re.compile(r"\b\s+:\s+"), ": ", _has(":")),
    (re.compile(r"(\D[,./])\b"), r"\1 ", _finds(r"[,./]\w")),
    (re.compile(r"\s+"), " ", lambda text: "  " in text or not _is_plain(text)),
]
_EDGES: list[Rule] = [
    (re.compile(r"^[\"']([\w\W]+)[\"']$"), r"\1", _begins("\"'")),
    (re.compile(r"^['_,\-:;]"), "", _begins("'_,-:;")),
    (re.compile(r"['_,\-:\-+]$"), "", lambda text: text.endswith(tuple("'_,-:+\n"))),
    (re.compile(r"^\.\S+$"), "", _begins(".")),
]


def clean_caption(caption: str, cleaning: Cleaning) -> str:
    """Returns the caption as the text encoder will see it.

    Whatever the caption holds, this raises nothing, and takes time in proportion to its length. Markup that the parser
    rejects, or that would keep it busy, loses what stands in angle brackets.

    Args:
        caption: As the manifest gives it.
        cleaning: ``deepfloyd``: lower case, without markup, URLs, nicknames, file names and the like, applied twice;
            ``none``: only the white space at both ends goes.
    """
    if cleaning == "none":
        return caption.strip()
    return _clean_once(_clean_once(caption))


def _clean_once(caption: str) -> str:
    text = urllib.parse.unquote_plus(str(caption)).strip().lower()
    text = _substitute(text, _BEFORE_MARKUP)
    if "<" in text or "&" in text:
        text = _without_markup(text)
    text = _substitute(text, _AFTER_MARKUP)
    if text.count("-") + text.count("_") > 3:
        text = _MANY_DASHES.sub(" ", text)
    if not _is_plain(text) or "&" in text:
        text = _unescape(_unescape(ftfy.fix_text(text)))
    text = text.strip()
    text = _substitute(text, _AFTER_REPAIR).strip()
    return _substitute(text, _EDGES).strip()


def _without_markup(text: str) -> str:
    text = ftfy.fixes.fix_surrogates(_NUMBERS.sub("\ufffd", text))
    if text.count("<") * len(text) <= _MOST_PARSED:
        with contextlib.suppress(ParserRejectedMarkup):
            return BeautifulSoup(text, features="html.parser").text
    return html.unescape(_TAGS.sub("", text))


def _unescape(text: str) -> str:
    return html.unescape(_NUMBERS.sub("\ufffd", text))


def _is_plain(text: str) -> bool:
    """Whether it holds printable ASCII only: with no reference to a character in it, there is nothing to repair."""
    return text.isascii() and text.isprintable()


def _substitute(text: str, rules: list[Rule]) -> str:
    for pattern, replacement, may_find in rules:
        if may_find(text):
            text = pattern.sub(replacement, text)
    return text
