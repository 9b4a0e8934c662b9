"""``triton`` and ``tl``, also where Triton is not installed: there kernels can be described, and not run.

What an operator gives back and what it keeps for its backward pass are known without a GPU, so that the memory of a
step can be counted on any machine. Triton comes with PyTorch for CUDA only.
"""

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Language:
        """Stands for ``triton.language`` while kernels are defined."""

        @staticmethod
        def constexpr(value: Any) -> Any:
            return value

    class _Triton:
        """Stands for ``triton``: its decorator leaves functions as they are, and nothing launches them."""

        @staticmethod
        def jit(function: Any) -> Any:
            return function

    triton, tl = _Triton(), _Language()

__all__ = ["tl", "triton"]
