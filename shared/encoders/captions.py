"""Caption cleaning, as the captions of DeepFloyd IF, PixArt and Open-Sora were cleaned before T5.

The rules follow ``clean_caption`` of DeepFloyd IF (``deepfloyd_if/modules/t5.py``): text that T5 saw cleaned in
training of those models must be cleaned likewise, or published weights see captions that they do not know. Applied
twice, as there: one round can uncover what the next removes.
"""

import html
import re
import urllib.parse
from typing import Literal

import ftfy
from bs4 import BeautifulSoup

Cleaning = Literal["deepfloyd", "none"]

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_BAD_PUNCTUATION = re.compile(r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+")

_BEFORE_MARKUP = [
    (re.compile(r"<person>"), "person"),
    (re.compile(rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b/?(?!@))"), ""),
    (re.compile(rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b/?(?!@))"), ""),
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
    (re.compile(r"[\S]+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"), ""),  # file names
    (re.compile(r"[\"']{2,}"), '"'),
    (re.compile(r"\.{2,}"), " "),
    (_BAD_PUNCTUATION, " "),
    (re.compile(r"\s+\.\s+"), " "),
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
    (re.compile(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b"), " "),
    (re.compile("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b"), ""),  # sizes
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
        text = BeautifulSoup(text, features="html.parser").text
    text = _substitute(text, _AFTER_MARKUP)
    if len(_MANY_DASHES.findall(text)) > 3:
        text = _MANY_DASHES.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = _substitute(text, _AFTER_REPAIR).strip()
    return _substitute(text, _EDGES).strip()


def _substitute(text: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
