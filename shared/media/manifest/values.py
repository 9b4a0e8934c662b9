"""The manifest's further columns: numbers where all of a column's values are numbers, truth values where all are true
or false, and text else. A column is looked at batch by batch, and converted when all of it was seen."""

import math
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

_TRUE = ["True", "true"]
_FALSE = ["False", "false"]
_NUMBER = r"^[+-]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|nan|NaN|inf|Infinity)\z"
"""What is a number in a column of numbers; 007 and 1_000 are names."""
_EXACT = 2**53
"""Above, a double does not tell an integer from its neighbour."""


def is_numeric(kind: pa.DataType) -> bool:
    """Returns whether Arrow's type is one of integers or floating-point numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def texts(array: pa.Array) -> pa.Array:
    """Returns a column's values as Python writes them: large_string."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_integer(array.type):
        return array.cast(pa.large_string())
    if pa.types.is_boolean(array.type):
        return pc.if_else(array, "True", "False").cast(pa.large_string())
    return pa.array([None if value is None else str(value) for value in array.to_pylist()], pa.large_string())


class ColumnKind:
    """What a column turns out to be."""

    def __init__(self) -> None:
        self._is_present, self._is_truth, self._is_number = False, True, True
        self._has_finite, self._largest = False, 0.0

    def look_at(self, array: pa.Array) -> None:
        """Takes further values of the column into account."""
        if pa.types.is_boolean(array.type):
            self._is_present |= array.null_count < len(array)
            self._is_number &= not self._is_present
            return
        if not is_numeric(array.type):
            array = texts(array)
            array = array.filter(pc.not_equal(array, ""))
            self._is_truth = self._is_truth and _all(pc.is_in(array, pa.array(_TRUE + _FALSE, array.type)))
            self._is_number = self._is_number and _all(pc.match_substring_regex(array, _NUMBER))
        else:
            array = array.drop_null()
            self._is_truth &= not len(array)
        self._is_present |= len(array) > 0
        if self._is_number and len(array):
            numbers = array.cast(pa.float64(), safe=False)
            sizes = pc.abs(numbers.filter(pc.is_finite(numbers)))
            self._has_finite |= len(sizes) > 0
            self._largest = max(self._largest, pc.max(sizes).as_py() or 0.0)

    @property
    def kind(self) -> Literal["truth", "number", "text"]:
        """What all values so far are."""
        if self._is_present and self._is_truth:
            return "truth"
        assert math.isfinite(self._largest)
        return "number" if self._is_number and self._has_finite and self._largest <= _EXACT else "text"

    def convert(self, array: pa.Array) -> pa.Array:
        """Returns some of the column's values as what the column is: bool, float64 or string."""
        if self.kind == "text":
            return texts(array).cast(pa.string())
        if not is_numeric(array.type) and not pa.types.is_boolean(array.type):
            array = texts(array)
            array = pc.if_else(pc.equal(array, ""), pa.scalar(None, array.type), array)
            if self.kind == "truth":
                return pc.if_else(pc.is_null(array), pa.scalar(None, pa.bool_()), pc.is_in(array, pa.array(_TRUE)))
        if self.kind == "truth":
            return array
        numbers = array.cast(pa.float64(), safe=False)
        return pc.if_else(pc.is_finite(numbers), numbers, pa.scalar(None, pa.float64()))


def _all(mask: pa.Array) -> bool:
    return pc.all(mask, min_count=0).as_py() is not False
