"""How many registers a kernel may take where a Triton newer than the one it was tuned with gives it more.

Registers decide how many programs of a kernel a multiprocessor holds. Triton 3.6, with which the kernels were timed,
needs no limit: under one it would make other code, even of kernels that keep to it.
"""


def at_most(registers: int, triton_version: str) -> dict[str, int]:
    """Returns the option of a launch that limits the registers of a thread: none up to Triton 3.6."""
    major, minor = map(int, triton_version.split(".")[:2])
    return {"maxnreg": registers} if (major, minor) > (3, 6) else {}
