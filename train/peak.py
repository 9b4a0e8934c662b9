"""The arithmetic that a device can do, and the share of it that is used."""

import time
from dataclasses import dataclass

import torch

_KNOWN_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "H800": 989.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}
"""Dense bfloat16 peaks by datasheet, by a part of the device's name; the first that occurs counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The arithmetic that one rank's device can do."""

    tflops: float
    source: str
    """``given``, ``datasheet`` or ``measured``."""


def known_peak(device_name: str) -> float | None:
    """Returns the dense bfloat16 TFLOP/s of a GPU by its name; None if it is not in the table."""
    return next((tflops for part, tflops in _KNOWN_TFLOPS.items() if part in device_name), None)


def find_peak(device: torch.device, precision: torch.dtype, given: float | None) -> Peak:
    """Returns what MFU is measured against: what was given, the datasheet, or a matrix product timed here.

    On ranks that share a processor all must measure at the same time.

    Args:
        device: Of this rank.
        precision: Of the model. On a CPU products run in float32, and so does the measurement.
        given: In TFLOP/s.
    """
    if given is not None:
        return Peak(tflops=given, source="given")
    if device.type == "cuda":
        datasheet = known_peak(torch.cuda.get_device_name(device))
        if datasheet is not None:
            return Peak(tflops=datasheet, source="datasheet")
        return Peak(tflops=_timed_product_tflops(device, precision, size=8192), source="measured")
    return Peak(tflops=_timed_product_tflops(device, torch.float32, size=1024), source="measured")


def _timed_product_tflops(device: torch.device, dtype: torch.dtype, *, size: int, repeats: int = 8) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def synchronize(device: torch.device) -> None:
    """Waits for a GPU's work; a CPU has none outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def utilisation(model_flop: float, seconds: float, world_size: int, peak_tflops: float) -> tuple[float, float]:
    """Returns TFLOP/s a device, and its share of the peak.

    Args:
        model_flop: Of all ranks together.
        seconds: In which they were done.
        world_size: Devices.
        peak_tflops: Of one device.
    """
    tflops = model_flop / seconds / world_size / 1e12
    return tflops, tflops / peak_tflops
