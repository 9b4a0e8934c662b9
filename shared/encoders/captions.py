"""Caption cleaning, as the captions of DeepFloyd IF, PixArt and Open-Sora were cleaned before T5.

The rules follow ``clean_caption`` of DeepFloyd IF (``deepfloyd_if/modules/t5.py``): text that T5 saw cleaned in
training of those models must be cleaned likewise, or published weights see captions that they do not know. Applied
twice, as there: one round can uncover what the next removes.
"""

import contextlib
import html
import re
import urllib.parse
from typing import Literal

import ftfy
from bs4 import BeautifulSoup
from bs4.exceptions import ParserRejectedMarkup

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


# What is bounded here and not in the publication (``(?<!``, ``++``) matches the same in linear time.
_BEFORE_MARKUP = [
    (re.compile(r"<person>"), "person"),
    (_url("https?"), r"\1"),
    (_url("www"), r"\1"),
]
_AFTER_MARKUP = [
    (re.compile(r"@[\w\d]+\b"), ""),  # nicknames
    (re.compile(r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+"), ""),
    (
        re.compile(
            "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
            "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+"
        ),
        "-",
    ),
    (re.compile("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]"), '"'),
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile(r"&quot;?"), ""),
    (re.compile(r"&amp"), ""),
    (re.compile(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"), " "),  # IP addresses
    (re.compile(r"\d:\d\d\s+$"), ""),  # numbers of articles
    (re.compile(r"\\n"), " "),
    (re.compile(r"#\d{1,3}\b"), ""),
    (re.compile(r"#\d{5,}\b"), ""),
    (re.compile(r"\b\d{6,}\b"), ""),
    (re.compile(r"(?<!\S)\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"), ""),  # file names
    (re.compile(r"[\"']{2,}"), '"'),
    (re.compile(r"\.{2,}"), " "),
    (_BAD_PUNCTUATION, " "),
    (re.compile(r"(?<!\s)\s++\.\s+"), " "),
]
_MANY_DASHES = re.compile(r"[-_]")
_AFTER_REPAIR = [
    (re.compile(r"\b[a-zA-Z]{1,3}\d{3,15}\b"), ""),  # codes of products
    (re.compile(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"), ""),
    (re.compile(r"\b\d+[a-zA-Z]+\d+\b"), ""),
    (re.compile(r"(worldwide\s+)?(free\s+)?shipping"), ""),
    (re.compile(r"(free\s)?download(\sfree)?"), ""),
    (re.compile(r"\bclick\b\s(?:for|on)\s\w+"), ""),
    (re.compile(r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simages?)?"), ""),
    (re.compile(r"\bpage\s+\d+\b"), ""),
    (re.compile(r"\b\d*+[a-zA-Z]++\d++[a-zA-Z]++\d[a-zA-Z\d]*+\b"), " "),
    (re.compile("\\b\\d++(?:\\.\\d*+)?[x\u0445\u00d7]\\d++(?:\\.\\d*)?\\b"), ""),  # sizes
    (re.compile(r"\b\s+:\s+"), ": "),
    (re.compile(r"(\D[,./])\b"), r"\1 "),
    (re.compile(r"\s+"), " "),
]
_EDGES = [
    (re.compile(r"^[\"']([\w\W]+)[\"']$"), r"\1"),
    (re.compile(r"^['_,\-:;]"), ""),
    (re.compile(r"['_,\-:\-+]$"), ""),
    (re.compile(r"^\.\S+$"), ""),
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
    if len(_MANY_DASHES.findall(text)) > 3:
        text = _MANY_DASHES.sub(" ", text)
    text = _unescape(_unescape(ftfy.fix_text(text))).strip()
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


def _substitute(text: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
