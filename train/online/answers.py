"""What a process that touched clips says to the trainer: JSON, and frames as bytes in memory that both see.

Nothing of it is pickled: whoever reads a pickle runs what its writer likes, and hostile media may have taken that
process over. For the same reason the memory of frames is sealed: it can neither shrink nor change under the trainer.
"""

import fcntl
import json
import math
import mmap
import os
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np

Kind = Literal["value", "input", "error"]
"""A result; the text of an :class:`~shared.errors.InputError`; the text of any other exception."""

_LARGEST_BYTES = 256 << 20
_ARRAY = "array"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class AnswerError(Exception):
    """An answer that is none."""


def send_answer(link: Connection, kind: Kind, value: Any) -> None:
    """Sends JSON values or, as a result, a uint8 array: of that the shape, and the descriptor of its memory."""
    if not isinstance(value, np.ndarray):
        link.send_bytes(json.dumps([kind, value]).encode())
        return
    assert value.dtype == np.uint8
    descriptor = os.memfd_create("latentmill-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, value.nbytes)
        with mmap.mmap(descriptor, value.nbytes) as memory:
            np.copyto(np.frombuffer(memory, np.uint8).reshape(value.shape), value)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        link.send_bytes(json.dumps([_ARRAY, value.shape]).encode())
        reduction.send_handle(link, descriptor, os.getppid())
    finally:
        os.close(descriptor)


def receive_answer(link: Connection) -> tuple[Kind, Any]:
    """Returns what :func:`send_answer` sent. Only its form is checked: what a value means is for the caller to doubt.

    Raises:
        AnswerError: if it is no answer.
        EOFError, OSError: if the other end is gone.
    """
    data = link.recv_bytes(_LARGEST_BYTES)
    try:
        match json.loads(data):
            case ["array", [*shape]] if all(type(length) is int and length > 0 for length in shape):
                return "value", _receive_array(link, tuple(shape))
            case ["value", value]:
                return "value", value
            case ["input" | "error" as kind, str() as text]:
                return kind, text
    except (ValueError, RuntimeError) as error:  # no JSON, or nested without end; no descriptor behind it
        raise AnswerError(str(error)) from None
    raise AnswerError("neither a value nor an error")


def _receive_array(link: Connection, shape: tuple[int, ...]) -> np.ndarray:
    descriptor = reduction.recv_handle(link)
    try:
        num_bytes = math.prod(shape)
        if os.fstat(descriptor).st_size != num_bytes or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise AnswerError(f"memory that is not that of an array of {shape}")
        memory = mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_COPY)
    except OSError as error:  # no memory at all: what is gone is told before
        raise AnswerError(str(error)) from None
    finally:
        os.close(descriptor)
    return np.frombuffer(memory, np.uint8).reshape(shape)
