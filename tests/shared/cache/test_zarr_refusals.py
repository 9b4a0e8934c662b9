"""Zarr shards: which zip files are refused."""

import io
import struct
import zipfile

import pytest

from shared.cache.zarr_zip import read_directory
from shared.errors import InputError
from tests.shared.cache.zarr_samples import make_samples, write


def zip_of(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return bytearray(file.getvalue())


def refusal(content: bytes | bytearray) -> str:
    """Returns the line with which a zip is refused."""
    with pytest.raises(InputError) as caught:
        read_directory(io.BytesIO(content))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../up", "a/../../up", "/etc/passwd", "a//b", "a/", "./a", "c:\\a", "C:/a", "a\\..\\b", "line\nbreak", ".."],
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    assert "is not a relative path inside the shard" in refusal(zip_of(("a/zarr.json", b"{}"), (name, b"1")))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_doubled_names_are_refused() -> None:
    assert "'a' stands in the zip file twice" in refusal(zip_of(("a", b"1"), ("b", b"2"), ("a", b"3")))


def test_compressed_entries_are_refused() -> None:
    deflated = zip_of(("a", b"1" * 1000), compression=zipfile.ZIP_DEFLATED)
    assert "'a' is compressed, expected stored" in refusal(deflated)
    of_equal_size = zip_of(("a", b"1"))
    of_equal_size[of_equal_size.index(b"PK\1\2") + 10] = zipfile.ZIP_DEFLATED
    assert "'a' is compressed, expected stored" in refusal(of_equal_size)


def test_encrypted_entries_are_refused() -> None:
    content = zip_of(("a", b"1"))
    content[content.index(b"PK\1\2") + 8] |= 1
    assert "'a' is encrypted" in refusal(content)


def test_a_stored_entry_whose_two_sizes_differ_is_refused() -> None:
    content = zip_of(("a", b"1"))
    struct.pack_into("<L", content, content.index(b"PK\1\2") + 24, 1 << 31)
    assert "'a' is compressed" in refusal(content)


def test_entries_that_overlap_are_refused() -> None:
    content = zip_of(("a", b"1" * 100), ("b", b"2"))
    first = content.index(b"PK\1\2")
    struct.pack_into("<2L", content, first + 20, 101, 101)
    assert "'b' overlaps the entry before it" in refusal(content)
    content = zip_of(("a", b"1"), ("b", b"2"))
    second = content.rindex(b"PK\1\2")
    struct.pack_into("<L", content, second + 42, 0)
    assert "overlaps" in refusal(content)


def test_an_entry_that_reaches_beyond_the_file_is_refused() -> None:
    content = zip_of(("a", b"1"))
    struct.pack_into("<2L", content, content.index(b"PK\1\2") + 20, 1 << 30, 1 << 30)
    assert "'a' reaches beyond the data of the file" in refusal(content)


@pytest.mark.parametrize("offset", [3, 1 << 30])
def test_an_entry_without_its_own_header_is_refused(offset: int) -> None:
    content = zip_of(("a", b"1"))
    struct.pack_into("<L", content, content.index(b"PK\1\2") + 42, offset)
    assert "'a' has no header where the directory says" in refusal(content)


def test_an_entry_whose_two_names_differ_is_refused() -> None:
    content = zip_of(("a", b"1"))
    content[30] = ord("b")
    assert "'a' is named 'b' in its own header" in refusal(content)


@pytest.mark.parametrize("content", [b"", b"PK\5\6", b"not a zip file at all" * 10])
def test_what_is_no_zip_is_refused(content: bytes) -> None:
    assert "not a readable zip file" in refusal(content)


def test_a_shard_cut_anywhere_is_refused() -> None:
    file = io.BytesIO()
    write(file, make_samples("bfloat16", "bfloat16", 1))
    content = file.getvalue()
    for end in range(0, len(content), 97):
        refusal(content[:end])


def test_no_change_of_a_directory_byte_escapes_as_another_error() -> None:
    file = io.BytesIO()
    write(file, make_samples("bfloat16", "bfloat16", 1))
    content = file.getvalue()
    start = content.index(b"PK\1\2")
    for position in range(start, len(content)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= change
            try:
                read_directory(io.BytesIO(damaged))
            except InputError as error:
                assert "\n" not in str(error)
