"""How attention kernels cut a head's width into two powers of two.

72 is 64 and 8 of 16: a tile of 128 would leave 44 % of its lanes idle.
"""

import torch


def fits_tiles(head_width: int) -> bool:
    """Whether heads of that width can be cut so that products take both parts, and rows begin at 16 bytes."""
    return 16 < head_width <= 128 and head_width % 8 == 0


def head_parts(head_width: int) -> tuple[int, int]:
    """Returns the widths of the tiles that hold the two parts: the largest power of two below, and the rest."""
    left = 1 << ((head_width - 1).bit_length() - 1)
    return left, max(16, 1 << (head_width - left - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Returns how products of a dtype are computed: float32 ones exactly."""
    return "ieee" if dtype == torch.float32 else "tf32"
