"""Named lists of buckets: the aspect-ratio tables of Open-Sora.

``16x240p`` is 16 frames in every size of the table 240p, ``1x512`` images in every size of the table 512. The sizes are
those of Open-Sora (https://github.com/hpcaitech/Open-Sora, ``opensora/datasets/aspect.py``, of versions 1.1 and 1.2;
with ``-v1.0`` behind the name, of the first version with tables), each side cut down to a multiple of 16: what an
autoencoder of stride 8 and patches of 2 take. There, the rest is padded.
"""

import re
from collections.abc import Iterable

from shared.errors import InputError
from shared.spec import Bucket

_MULTIPLE = 16
_NAME = re.compile(r"([1-9][0-9]*)x([0-9]+[pk]?(?:-v1\.0)?)")

Sizes = tuple[tuple[int, int], ...]


def _pairs(text: str) -> Sizes:
    """Returns the sizes (height, width) that a line writes as HxW."""
    return tuple((int(height), int(width)) for height, width in (size.split("x") for size in text.split()))


_PIXART_1024 = _pairs(
    "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 "
    "768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 "
    "1152x896 1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 "
    "1856x512 1920x512 1984x512 2048x512"
)
"""PixArt's, from which those of 512 and 256 are made by halving; in all versions."""

PUBLISHED: dict[str, Sizes] = {
    "144p": _pairs(
        "117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221 192x192 221x165 235x156 "
        "256x144 263x139 271x135 277x132"
    ),
    "240p": _pairs(
        "196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368 320x320 370x278 392x262 "
        "426x240 440x232 452x226 462x222"
    ),
    "360p": _pairs(
        "294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554 480x480 554x416 588x392 "
        "640x360 660x350 678x340 692x332"
    ),
    "480p": _pairs(
        "392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738 640x640 740x555 784x522 "
        "854x480 880x466 906x454 924x444"
    ),
    "720p": _pairs(
        "588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176 832x1110 960x960 1108x832 "
        "1176x784 1280x720 1320x698 1358x680 1386x666"
    ),
    "1080p": _pairs(
        "882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820 1176x1764 1248x1664 1440x1440 "
        "1662x1246 1764x1176 1920x1080 1980x1048 2036x1018 2078x998"
    ),
    "4k": _pairs(
        "1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2160x3840 2276x3642 2352x3528 2494x3326 2880x2880 "
        "3326x2494 3528x2352 3840x2160 3958x2096 4072x2036 4156x1994"
    ),
    "240p-v1.0": _pairs(
        "200x512 208x496 222x462 226x452 230x442 240x426 260x394 276x368 320x320 368x276 394x260 426x240 444x232 "
        "452x226 464x220"
    ),
    "360p-v1.0": _pairs(
        "300x770 312x742 332x692 340x680 346x666 360x640 390x590 416x554 480x480 554x416 592x390 640x360 666x346 "
        "678x339 696x332"
    ),
    "480p-v1.0": _pairs(
        "400x1026 414x986 444x925 452x904 462x888 480x854 520x788 554x738 640x640 738x554 790x520 854x480 888x462 "
        "906x453 928x442"
    ),
    "720p-v1.0": _pairs(
        "600x1538 622x1480 666x1388 678x1356 692x1330 720x1280 780x1182 832x1110 960x960 1108x834 1184x778 1280x720 "
        "1330x692 1358x679 1392x662"
    ),
    "1080p-v1.0": _pairs(
        "900x2308 934x2224 998x2080 1018x2036 1038x1996 1080x1920 1170x1772 1248x1664 1440x1440 1660x1248 1776x1168 "
        "1922x1080 1996x1040 2036x1018 2086x994"
    ),
    "256": tuple((height // 4, width // 4) for height, width in _PIXART_1024),
    "512": tuple((height // 2, width // 2) for height, width in _PIXART_1024),
    "1024": _PIXART_1024,
}
"""By name, (height, width) in pixels as they are published, wide ones first."""


def parse_buckets(texts: Iterable[str]) -> tuple[Bucket, ...]:
    """Returns the buckets that are written as ``FRAMESxHEIGHTxWIDTH`` or named ``FRAMESxTABLE``, each once.

    Args:
        texts: E.g. ``16x256x256`` or ``16x240p``, in the order in which the buckets are wanted.

    Raises:
        InputError: if one has another form, or there is no such table.
    """
    return tuple(dict.fromkeys(bucket for text in texts for bucket in _buckets(text)))


def _buckets(text: str) -> list[Bucket]:
    match = _NAME.fullmatch(text)
    if match is None:
        return [Bucket.parse(text)]
    frames, name = match.groups()
    if name not in PUBLISHED:
        raise InputError(
            f"bucket {text!r}: no table {name!r}: expected one of {', '.join(PUBLISHED)}, or FRAMESxHEIGHTxWIDTH"
        )
    return [
        Bucket(int(frames), height // _MULTIPLE * _MULTIPLE, width // _MULTIPLE * _MULTIPLE)
        for height, width in PUBLISHED[name]
    ]
