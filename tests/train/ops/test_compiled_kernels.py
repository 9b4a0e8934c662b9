"""How many programs of a kernel are resident with the Triton that is installed: as many as its launch counts on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

RESIDENT = {
    "along time, 16 frames, norm, RoPE, backward": ("_backward", 3),
    "along time, 64 frames, norm, backward": ("_backward", 3),
    "norm, 1 group, forward": ("_forward", 16),
    "sum and norm, 1 group, forward": ("_forward", 16),
    "norm, to parcels, forward": ("_forward", 16),
    "norm, to parcels, backward": ("_backward", 8),
    "gate, to parcels, forward": ("_forward", 16),
    "gate, from parcels, read twice, backward": ("_backward", 8),
    "GELU, forward": ("_forward", 12),
    "GELU, 8 bits, backward": ("_convert_and_sum", 3),
    "8 bits and sums, 1152 wide": ("_convert_and_sum", 10),
    "8 bits and sums, 3456 wide": ("_convert_and_sum", 5),
    "qk-norm, backward": ("_backward", 3),
    "VAE, 512 channels, add": ("_statistics", 4),
}
"""Of a case's kernel, on one of Hopper's multiprocessors."""


def test_no_triton_takes_registers_that_cost_a_resident_program_or_spills_more_than_a_few() -> None:
    table = subprocess.run(
        [sys.executable, "-m", "tests.train.ops.compiled_kernels", *RESIDENT],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = re.findall(r"^(.+?) +(\w+) +\d+ warps +\d+ +(\d+) +[\d,]+ +(\d+) +\d+$", table, re.MULTILINE)
    compiled = {(case, kernel): (int(spilled), int(resident)) for case, kernel, spilled, resident in found}
    for case, (kernel, least) in RESIDENT.items():
        spilled, resident = compiled[case, kernel]
        assert resident >= least, table
        assert spilled <= 32, table
