"""Which model is trained."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from shared.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchitectureOptions:
    """Which model is trained."""

    model: str = "stdit-xl/2"
    """A preset: stdit-xl/2, stdit3-xl/2, stdit3-3b/2, dit-xl/2; -s/2 and -ti/2 are small (docs/models.md)."""
    model_settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Settings of the model that differ from the preset, e.g. ``depth=4 hidden_size=128``. Values are JSON."""

    @property
    def overrides(self) -> dict[str, Any]:
        """The model's settings, parsed.

        Raises:
            InputError: if one is not NAME=VALUE with a JSON value.
        """
        overrides = {}
        for setting in self.model_settings:
            name, separator, value = setting.partition("=")
            try:
                overrides[name] = json.loads(value)
            except json.JSONDecodeError:
                separator = ""
            if not separator:
                raise InputError(f"--set {setting}: expected NAME=VALUE with a JSON value, e.g. depth=4")
        return overrides
