"""When the registers of a kernel are limited."""

import pytest

from shared.registers import at_most


@pytest.mark.parametrize("version", ["3.5.1", "3.6.0", "3.6.1+git9844da95"])
def test_the_triton_by_which_kernels_were_timed_compiles_them_as_it_did(version: str) -> None:
    assert at_most(168, version) == {}


@pytest.mark.parametrize("version", ["3.7.0", "3.7.1+git1234", "3.10.0", "4.0.0"])
def test_newer_tritons_are_held_to_as_many_registers(version: str) -> None:
    assert at_most(168, version) == {"maxnreg": 168}
