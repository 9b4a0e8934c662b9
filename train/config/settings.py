"""What the groups of options share: the mark of those that may change, and checks that name what was found."""

import math
from typing import Annotated, Any, TypeVar

from shared.errors import InputError

_Value = TypeVar("_Value")

MAY_CHANGE = "may change"
MayChange = Annotated[_Value, MAY_CHANGE]
"""Around the type of an option that may differ when a run goes on: it decides nothing that is learnt."""

ADJUSTABLE = "adjustable"
Adjustable = Annotated[_Value, ADJUSTABLE]
"""Around the type of an option that decides how a run learns from here on, and nothing of what it has learnt or keeps:
it may differ when the run goes on, which the log then says."""


def require_at_least(options: Any, least: int, *names: str) -> None:
    """Raises :class:`InputError` for an option that is below ``least``; None is left alone."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise InputError(f"{name}={value}: expected at least {least}")


def require_positive(options: Any, *names: str) -> None:
    """Raises :class:`InputError` for an option that is not finite and above 0; None is left alone."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name}={value}: expected more than 0{', and a finite number' * (value == math.inf)}")
