"""Short pieces of host machine code that an engine calls where a Python callback would cost more than the work.

Each has a twin in Python that does the same, for hosts that it is not for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from functools import lru_cache
from typing import Any, Final


@lru_cache
def placed(code: bytes) -> int | None:
    """The address of x86-64 code, never writable and executable at once; None on hosts that it is not for."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    file = os.memfd_create("vmm machine code")
    try:
        os.write(file, code)
        os.ftruncate(file, mmap.PAGESIZE)
        area: int | None = _map(
            None, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_SHARED, file, 0
        )
    finally:
        os.close(file)
    return None if area in (None, _MAP_FAILED) else area


_MAP_FAILED: Final = ctypes.c_void_p(-1).value
# mmap.mmap gives no address for pages that Python cannot write to.
_map: Any = ctypes.CDLL(None).mmap if sys.platform == "linux" else None
if _map is not None:
    _map.restype = ctypes.c_void_p
    _map.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_size_t,
    )  # fmt: skip
