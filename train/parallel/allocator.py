"""What PyTorch's allocator of GPU memory is told by the environment. Pure."""

from collections.abc import Mapping, MutableMapping

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where it is told what to do: the variable's name, and the one that it had before, read where the first is not set."""
_GROWS = "expandable_segments"


def let_segments_grow(environment: MutableMapping[str, str]) -> None:
    """Has PyTorch's allocator grow its segments, unless the user has told it anything.

    Else the steps of one bucket leave holes that those of the next cannot use: twelve buckets in turn, of 60 GiB at
    most, took all of 80 GB; so they take 60.5 (docs/performance_notes.md).

    Args:
        environment: Of this process, before it touches a GPU.
    """
    if not any(name in environment for name in _SETTINGS):
        environment[_SETTINGS[0]] = f"{_GROWS}:True"


def segments_grow(environment: Mapping[str, str]) -> bool:
    """Returns whether they do in a process whose environment :func:`let_segments_grow` has seen, or is to see."""
    told = next((environment[name] for name in _SETTINGS if name in environment), f"{_GROWS}:True")
    settings = dict(part.partition(":")[::2] for part in told.replace(" ", "").split(","))
    return settings.get(_GROWS, "").lower() == "true"
