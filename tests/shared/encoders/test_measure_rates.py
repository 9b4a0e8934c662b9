"""Encode rates can be measured on any machine."""

from typing import Any

import pytest

from shared.encoders.architectures import ARCHITECTURES
from shared.encoders.measure_rates import CASES, Case, measure


@pytest.mark.parametrize(("model", "unit"), [("sd", "pixels_per_second"), ("t5-xxl", "tokens_per_second")])
def test_a_rate_is_units_over_seconds(model: str, unit: str) -> None:
    found: dict[str, Any] = measure(Case(model=model), device="cpu", tiny=True)
    units = found["frames"] * found["size"] ** (1 if model == "t5-xxl" else 2)
    assert found[unit] == pytest.approx(units / found["seconds"])
    assert found["seconds"] > 0


def test_every_architecture_is_measured() -> None:
    assert {case.model for case in CASES} == {*ARCHITECTURES, "t5-xxl"} - {"sdxl"}
