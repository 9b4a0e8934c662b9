"""Choosing rows of the index: by an expression over its columns, and by a hash of the source.

An expression is read with Python's own parser and turned into Arrow's operations; only comparisons, ``in``, ``and``,
``or``, ``not``, arithmetic, literals and names of columns are let through, so nothing of it is ever executed.
"""

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.schema import ABOUT, MANIFEST, WINDOW
from shared.errors import InputError
from train.permutation import Words, hash_words, uniform

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type[ast.operator], tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    ast.Add: (pc.add, operator.add),
    ast.Sub: (pc.subtract, operator.sub),
    ast.Mult: (pc.multiply, operator.mul),
    ast.Div: (pc.divide, operator.truediv),
}
_HASHED_AT_ONCE = 200_000


class Where:
    """A condition such as ``aesthetic > 5 and fps >= 24``.

    A name is a column of the index or, where the index has none of that name, of the manifest; ``manifest["name"]``
    is the manifest's, whatever its name. Where a value is missing a comparison is neither true nor false, and the
    row is left out; ``x is None`` and ``x is not None`` ask for that.

    Raises:
        InputError: if the text is no such expression.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        try:
            self._body = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise self._refused(f"not an expression ({error})") from None
        self._columns: dict[str, tuple[str, ...]] = {}
        self._evaluate(self._body, None)

    @property
    def paths(self) -> list[str]:
        """Parquet paths of the columns that it needs, if they are there."""
        return [path for paths in self._columns.values() for path in paths]

    def select(self, table: pa.Table, known: Callable[[], Sequence[str]]) -> pa.Array:
        """Returns which rows of a table fulfil the condition: (N,) booleans without nulls.

        Args:
            table: With the columns of :attr:`paths`.
            known: Returns the names of all columns of the cache, for the message about one that is not there.

        Raises:
            InputError: for a column that is not in the table, or values that cannot be compared.
        """
        for name, paths in self._columns.items():
            if _first_column(table, paths) is None:
                raise InputError(f"--where {self._text!r}: no column {name!r}: the cache has {', '.join(known())}")
        try:
            chosen = self._evaluate(self._body, table)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, TypeError, ZeroDivisionError) as error:
            raise self._refused(" ".join(str(error).split())) from None
        if isinstance(chosen, pa.ChunkedArray):
            chosen = chosen.combine_chunks()
        if not isinstance(chosen, pa.Array) or not pa.types.is_boolean(chosen.type):
            raise self._refused("it is a value, not a condition: compare it with something")
        return pc.fill_null(chosen, False)

    def _refused(self, reason: str) -> InputError:
        return InputError(
            f'--where {self._text!r}: {reason}: expected comparisons of columns, as in "aesthetic > 5 and fps >= 24"'
        )

    def _evaluate(self, node: ast.expr, table: pa.Table | None) -> Any:
        """Returns the node's values over a table; without one, notes the columns and checks that all is allowed."""
        match node:
            case ast.BoolOp(op=kind, values=values):
                parts = [self._evaluate(value, table) for value in values]
                join = pc.and_kleene if isinstance(kind, ast.And) else pc.or_kleene
                result = parts[0]
                for part in parts[1:]:
                    result = None if table is None else join(result, part)
                return result
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                value = self._evaluate(operand, table)
                return None if table is None else pc.invert(value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self._evaluate(operand, table)
                return None if table is None else _negated(value)
            case ast.Compare(left=left, ops=kinds, comparators=rights):
                return self._compare(left, kinds, rights, table)
            case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _ARITHMETIC:
                first, second = self._evaluate(left, table), self._evaluate(right, table)
                over_columns, over_numbers = _ARITHMETIC[type(kind)]
                if table is None:
                    return None
                if not _is_column(first) and not _is_column(second):
                    return over_numbers(first, second)
                if isinstance(kind, ast.Div):
                    first = first.cast(pa.float64()) if _is_column(first) else float(first)
                return over_columns(first, second)
            case ast.Constant(value=value) if value is None or isinstance(value, bool | int | float | str):
                return value
            case ast.Name(id=name):
                return self._look_up(name, _paths(name), table)
            case ast.Subscript(value=ast.Name(id="manifest"), slice=ast.Constant(value=str(name))):
                return self._look_up(name, (f"{MANIFEST}.{name}",), table)
        raise self._refused(f"{ast.unparse(node)!r} is not allowed")

    def _look_up(self, name: str, paths: tuple[str, ...], table: pa.Table | None) -> Any:
        if table is not None:
            return _first_column(table, paths)
        self._columns[name] = tuple(dict.fromkeys([*self._columns.get(name, ()), *paths]))
        return None

    def _compare(self, left: ast.expr, kinds: list[ast.cmpop], rights: list[ast.expr], table: pa.Table | None) -> Any:
        value, result = self._evaluate(left, table), None
        for kind, right in zip(kinds, rights, strict=True):
            if isinstance(kind, ast.In | ast.NotIn):
                part, other = self._contained(value, right, table), None
                part = pc.invert(part) if table is not None and isinstance(kind, ast.NotIn) else part
            elif isinstance(kind, ast.Is | ast.IsNot):
                if not (isinstance(right, ast.Constant) and right.value is None):
                    raise self._refused(f"'is {ast.unparse(right)}' is not allowed, only 'is None' and 'is not None'")
                part, other = None, None
                if table is not None:
                    part = pc.is_null(value) if isinstance(kind, ast.Is) else pc.is_valid(value)
            else:
                other = self._evaluate(right, table)
                if isinstance(right, ast.Constant) and right.value is None:
                    raise self._refused("a comparison with None is never true: write 'is None'")
                part = None if table is None else _COMPARISONS[type(kind)](value, other)
            value = other
            result = part if result is None or part is None else pc.and_kleene(result, part)
        return result

    def _contained(self, value: Any, right: ast.expr, table: pa.Table | None) -> Any:
        if not isinstance(right, ast.Tuple | ast.List | ast.Set):
            raise self._refused(f"'in {ast.unparse(right)}' is not allowed: give a list, as in x in (1, 2)")
        choices = [self._evaluate(element, None) for element in right.elts if isinstance(element, ast.Constant)]
        if len(choices) != len(right.elts) or not choices:
            raise self._refused(f"'in {ast.unparse(right)}' is not allowed: the list holds other things than values")
        if table is None:
            return None
        contained = pc.is_in(value, value_set=pa.array(choices).cast(value.type))
        return pc.if_else(pc.is_valid(value), contained, pa.scalar(None, pa.bool_()))


def _is_column(value: Any) -> bool:
    return isinstance(value, pa.Array | pa.ChunkedArray)


def _negated(value: Any) -> Any:
    return pc.negate(value) if _is_column(value) else -value


def _paths(name: str) -> tuple[str, ...]:
    """Returns where a column of that name is looked for, in this order; an index may lack those of windows."""
    if name in ABOUT.names or name == "sample":
        return (name,)
    of_manifest = f"{MANIFEST}.{name}"
    return (name, of_manifest) if name in WINDOW.names else (of_manifest,)


def _first_column(table: pa.Table, paths: tuple[str, ...]) -> pa.ChunkedArray | None:
    found = (_column(table, path) for path in paths)
    return next((column for column in found if column is not None), None)


def _column(table: pa.Table, path: str) -> pa.ChunkedArray | None:
    if not path.startswith(f"{MANIFEST}."):
        if path not in table.column_names:
            return None
        return pc.fill_null(table[path], False) if path == "flip" else table[path]
    name = path.removeprefix(f"{MANIFEST}.")
    if MANIFEST not in table.column_names:
        return None
    kind = table.schema.field(MANIFEST).type
    if kind.get_field_index(name) < 0:
        return None
    chunks = [pc.struct_field(chunk, name) for chunk in table[MANIFEST].chunks]
    return pa.chunked_array(chunks, kind.field(name).type)


def parse_fraction(text: str) -> float:
    """Returns the fraction written as ``1%`` or ``0.01``.

    Raises:
        InputError: if it is not between 0 and 1.
    """
    try:
        fraction = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise InputError(f"--holdout {text}: expected a part of the samples between 0 and 1, e.g. 1% or 0.01")
    return fraction


def held_out(sources: pa.ChunkedArray, fraction: float) -> np.ndarray:
    """Returns which rows are held out: (N,) booleans. All samples of a source are on one side, in any cache.

    Args:
        sources: Strings.
        fraction: The part to hold out, as a probability for each source.
    """
    return uniform(hash_strings(sources)) < fraction


def hash_strings(strings: pa.ChunkedArray) -> Words:
    """Returns 64 bits (N,) for each string: the sum of its bytes, each times a random weight of its place, mixed."""
    parts = [np.zeros(0, np.uint64)]
    for chunk in strings.chunks:
        for start in range(0, len(chunk), _HASHED_AT_ONCE):
            parts.append(_hash_chunk(chunk.slice(start, _HASHED_AT_ONCE).cast(pa.large_binary())))
    return np.concatenate(parts)


def _hash_chunk(strings: pa.Array) -> Words:
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    if not len(strings):
        return np.zeros(0, np.uint64)
    lengths = np.diff(ends)
    values = np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]].astype(np.uint64)
    places = np.arange(len(values)) - np.repeat(ends[:-1] - ends[0], lengths)
    sums = np.zeros(len(strings), np.uint64)
    filled = np.flatnonzero(lengths)
    if len(filled):
        weights = hash_words(np.arange(lengths.max())) | np.uint64(1)
        with np.errstate(over="ignore"):
            products = (values + np.uint64(1)) * weights[places]
            sums[filled] = np.add.reduceat(products, (ends[:-1] - ends[0])[filled])
    return hash_words(sums, lengths)
