"""Ask MKL, where PyTorch has brought it, in which order it sums: Intel's conditional numerical reproducibility."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

BRANCH = 1  # MKL_CBWR_BRANCH in Intel's mkl_service.h; MKL_CBWR_* there are these:
BRANCHES = {1: "off", 2: "auto", 3: "compatible", 4: "sse2", 6: "ssse3", 7: "sse4_1", 8: "sse4_2", 9: "avx",
            10: "avx2", 12: "avx512", 14: "avx512_e1"}  # fmt: skip


@functools.cache
def mkl_reproducibility(library: Path) -> str:
    """Return the branch of conditional numerical reproducibility, such as "off"; "none" without an MKL to be asked.

    Args:
        library: The shared library that MKL is linked into, loaded already.
    """
    try:
        branch = ctypes.CDLL(str(library)).mkl_serv_cbwr_get(BRANCH)  # mkl_cbwr_get, under its name inside MKL
    except (OSError, AttributeError):
        return "none"
    return BRANCHES.get(branch, str(branch))
