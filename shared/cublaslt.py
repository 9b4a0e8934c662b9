"""Large products by an algorithm of cuBLASLt that PyTorch does not take.

Under steady load Hopper runs at its limit of power, and lowers its clock for what draws more. cuBLASLt's heuristic,
whose first answer is what PyTorch takes, does not know of that. Other algorithms that it has do more then
(docs/training_speed.md has the figures). Those used here sum in the same order, so that no bit of a result differs.

The library is the one that PyTorch has loaded, called through ctypes as its manual says (cuBLAS 13, "Using the cuBLASLt
API"). Where it is of another version, or offers no such algorithm, nothing is found, and the product is PyTorch's.

Letters: M rows, K inner size, N columns.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

_MAJOR_VERSION = 13
"""What its algorithms' settings mean is not said for others."""
_BFLOAT16, _FLOAT32, _COMPUTE_FLOAT32 = 14, 0, 68
_FIRST_TRANSPOSED, _SECOND_TRANSPOSED, _EPILOGUE, _BIAS, _BIAS_TYPE = 3, 4, 7, 8, 26
"""Attributes of a product."""
_ADDS_BIAS = 4
_LEAST_ALIGNMENTS = (5, 6, 7, 8)
"""Attributes of what the heuristic is told: bytes that addresses are multiples of, of four matrices."""
_ALIGNMENT = 16
_TILE, _SPLIT, _SWIZZLE, _CUSTOM, _CLUSTER = 1, 2, 4, 5, 8
"""Attributes of an algorithm."""
_MOST_WORKSPACE = 256
"""Bytes: the check asks for 4 where the heuristic asks for none."""
_OFFERS = 24
"""How many answers of the heuristic are looked at."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One of cuBLASLt's, by what it calls its settings."""

    tile: int
    """Of ``cublasLtMatmulTile_t``."""
    cluster: int
    """Of ``cublasLtClusterShape_t``."""
    custom: int
    """Its ``CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION``."""


class _Settings(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Offer(ctypes.Structure):
    _fields_ = (
        ("settings", _Settings),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class _RefusedError(Exception):
    """The library does not do what is asked of it."""


_Made = list[tuple[str, ctypes.c_void_p]]
"""Descriptions that are to be freed, by what they describe."""


class _Library:
    """cuBLASLt, for one device.

    Raises:
        _RefusedError: where there is none, or one of another version.
    """

    def __init__(self) -> None:
        try:  # PyDLL: a launch is too short for others to have Python meanwhile
            self._functions = ctypes.PyDLL(f"libcublasLt.so.{_MAJOR_VERSION}")
        except OSError as error:
            raise _RefusedError(str(error)) from None
        self.handle = ctypes.c_void_p()
        self.call("Create", ctypes.byref(self.handle))

    def function(self, name: str) -> Callable[..., int]:
        """Returns a function by its name without ``cublasLt``."""
        try:
            found: Callable[..., int] = getattr(self._functions, f"cublasLt{name}")
        except AttributeError as error:
            raise _RefusedError(str(error)) from None
        return found

    def call(self, name: str, *arguments: object) -> None:
        """Raises :class:`_RefusedError` unless the function succeeds."""
        if status := self.function(name)(*arguments):
            raise _RefusedError(f"cublasLt{name}: status {status}")

    def set(self, what: str, handle: object, attribute: int, value: "ctypes._SimpleCData[int]") -> None:
        """Sets an attribute of what has such."""
        self.call(f"{what}SetAttribute", handle, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))

    def layout(self, rows: int, columns: int, made: _Made) -> ctypes.c_void_p:
        """Returns the description of a contiguous matrix: for cuBLAS, which counts by columns, its transpose."""
        layout = ctypes.c_void_p()
        sizes = ctypes.c_uint64(columns), ctypes.c_uint64(rows), ctypes.c_int64(columns)
        self.call("MatrixLayoutCreate", ctypes.byref(layout), _BFLOAT16, *sizes)
        made.append(("MatrixLayout", layout))
        return layout

    def operation(self, made: _Made, *, transposed: bool, bias: bool) -> ctypes.c_void_p:
        """Returns the description of a product. What is second here comes first there."""
        operation = ctypes.c_void_p()
        self.call("MatmulDescCreate", ctypes.byref(operation), _COMPUTE_FLOAT32, _FLOAT32)
        made.append(("MatmulDesc", operation))
        self.set("MatmulDesc", operation, _FIRST_TRANSPOSED, ctypes.c_int32(transposed))
        self.set("MatmulDesc", operation, _SECOND_TRANSPOSED, ctypes.c_int32(0))
        if bias:
            self.set("MatmulDesc", operation, _EPILOGUE, ctypes.c_uint32(_ADDS_BIAS))
            self.set("MatmulDesc", operation, _BIAS_TYPE, ctypes.c_int32(_BFLOAT16))
        return operation

    def offers(self, operation: ctypes.c_void_p, layouts: tuple[ctypes.c_void_p, ...]) -> list[_Settings]:
        """Returns the heuristic's answers that need no memory of their own."""
        preference = ctypes.c_void_p()
        self.call("MatmulPreferenceCreate", ctypes.byref(preference))
        found, offers = ctypes.c_int(0), (_Offer * _OFFERS)()
        try:
            for attribute in _LEAST_ALIGNMENTS:
                self.set("MatmulPreference", preference, attribute, ctypes.c_uint32(_ALIGNMENT))
            into = _OFFERS, offers, ctypes.byref(found)
            self.call("MatmulAlgoGetHeuristic", self.handle, operation, *layouts, preference, *into)
        finally:
            self.call("MatmulPreferenceDestroy", preference)
        return [offer.settings for offer in offers[: found.value] if offer.state == 0 and offer.workspace == 0]

    def forget(self, made: _Made) -> None:
        """Frees descriptions; what was launched with them does not need them."""
        for what, handle in made:
            self.function(f"{what}Destroy")(handle)

    def setting(self, settings: _Settings, attribute: int) -> int:
        """Returns a setting of an algorithm."""
        value, written = ctypes.c_uint32(0), ctypes.c_size_t(0)
        into = ctypes.byref(value), ctypes.c_size_t(4), ctypes.byref(written)
        self.call("MatmulAlgoConfigGetAttribute", ctypes.byref(settings), attribute, *into)
        return value.value


class Product:
    """The product of matrices of one size, by one algorithm. Its descriptions live as long as it does.

    Threads may share it: a bias is part of the description, which one thread at a time sets and launches with.

    Args:
        device: Whose.
        sizes: M, K and N.
        algorithm: Which.
        transposed: Whether the second matrix is (N, K).
        bias: Whether one is added, (N,).
        adds: Whether the product is added to what is there, in float32.
        asked_rows: Rows that the heuristic is asked about; M if None. It offers few algorithms for each number, and
            others where the last tiles would be nearly empty. One that it offers for some rows is right for others.

    Raises:
        _RefusedError: where the library has no such algorithm for these sizes.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: tuple[int, int, int],
        algorithm: Algorithm,
        *,
        transposed: bool,
        bias: bool,
        adds: bool,
        asked_rows: int | None,
    ) -> None:
        M, K, N = sizes
        library, made = _library(device), _Made()
        weakref.finalize(self, library.forget, made).atexit = False  # also if it is refused below
        first = library.layout(N, K, made) if transposed else library.layout(K, N, made)
        second, result = library.layout(M, K, made), library.layout(M, N, made)
        layouts = asked = first, second, result, result
        if asked_rows is not None:
            asked_result = library.layout(asked_rows, N, made)
            asked = first, library.layout(asked_rows, K, made), asked_result, asked_result
        plain = library.operation(made, transposed=transposed, bias=False)  # with a bias the heuristic answers less
        self._operation = library.operation(made, transposed=transposed, bias=bias)
        self._settings = next(
            (offer for offer in library.offers(plain, asked) if library.setting(offer, _TILE) == algorithm.tile), None
        )
        if self._settings is None or library.setting(self._settings, _SPLIT) > 1:
            raise _RefusedError("no such tile")
        self._settings = _Settings.from_buffer_copy(self._settings)
        settings = ctypes.byref(self._settings)
        library.set("MatmulAlgoConfig", settings, _SWIZZLE, ctypes.c_uint32(0))
        library.set("MatmulAlgoConfig", settings, _CUSTOM, ctypes.c_uint32(algorithm.custom))
        library.set("MatmulAlgoConfig", settings, _CLUSTER, ctypes.c_uint16(algorithm.cluster))
        checked = _Offer()
        library.call("MatmulAlgoCheck", library.handle, self._operation, *layouts, settings, ctypes.byref(checked))
        if checked.state or checked.workspace > _MOST_WORKSPACE:
            raise _RefusedError("not for these sizes")
        self._library, self._bias_at, self._bias_turn = library, ctypes.c_void_p(), threading.Lock()
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._device = device.index
        self._stream_of = torch._C._cuda_getCurrentRawStream
        pointer, number = ctypes.c_void_p, ctypes.c_size_t
        self._matmul = library.function("Matmul")
        self._matmul.argtypes = [*[pointer] * 14, number, pointer]  # type: ignore[attr-defined]
        self._before = library.handle, self._operation, ctypes.addressof(self._one)
        self._first, self._second, self._result = first, second, result
        self._factor = ctypes.addressof(self._one if adds else self._zero)
        self._after = ctypes.addressof(self._settings), _workspace(device).data_ptr(), _MOST_WORKSPACE

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """Writes the product of contiguous a and b, and the bias where there is one, into out (M, N), or adds it."""
        if bias is None:
            status = self._launch(a, b, out)
        else:
            with self._bias_turn:
                self._bias_at.value = bias.data_ptr()
                self._library.set("MatmulDesc", self._operation, _BIAS, self._bias_at)  # type: ignore[arg-type]
                status = self._launch(a, b, out)
        if status:
            raise RuntimeError(f"cublasLtMatmul of {tuple(a.shape)} and {tuple(b.shape)}: status {status}")

    def _launch(self, a: Tensor, b: Tensor, out: Tensor) -> int:
        at = out.data_ptr()
        return self._matmul(
            *self._before,
            b.data_ptr(),
            self._first,
            a.data_ptr(),
            self._second,
            self._factor,
            at,
            self._result,
            at,
            self._result,
            *self._after,
            self._stream_of(self._device),
        )


_BUILDING = threading.Lock()
"""One thread at a time, so that there is one library and one workspace a device."""


@cache
def _library(_device: torch.device) -> _Library:
    return _Library()


@cache
def _workspace(device: torch.device) -> Tensor:
    """Stays as long as the process: recorded graphs hold its address."""
    return torch.zeros(_MOST_WORKSPACE, dtype=torch.uint8, device=device)


@lru_cache(maxsize=1024)
def find_product(
    device: torch.device,
    sizes: tuple[int, int, int],
    algorithm: Algorithm,
    *,
    transposed: bool = False,
    bias: bool = False,
    adds: bool = False,
    asked_rows: int | None = None,
) -> Product | None:
    """Returns the :class:`Product`, or None where the library does not have it for these sizes."""
    try:
        with _BUILDING:
            given = {"transposed": transposed, "bias": bias, "adds": adds}
            return Product(device, sizes, algorithm, **given, asked_rows=asked_rows)
    except _RefusedError:
        return None


def may_multiply(*tensors: Tensor) -> bool:
    """Whether all are contiguous, of bfloat16, and begin where a kernel can load 16 bytes at once."""
    begins = 0
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
            return False
        begins |= tensor.data_ptr()
    return begins % _ALIGNMENT == 0
