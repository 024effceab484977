"""Leaving out the engine's question, after each memory access, whether to stop.

Translated code asks that behind every load and store, which takes half the time of code that loads and stores. A
byte in ``struct uc_struct`` that no interface shows (Unicorn's own ``no_exit_request``) has translations made without
the question. The engine then stops at the end of a block, which is where the VMM has it stop anyway; refused fills are
as exact as before, and a stop from another thread does not come in the middle of an instruction any more (quirk
"no-exit-request").

Nothing depends on it. The byte is used only where its place is known and a trial shows that it does what it should.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import lru_cache
from typing import Final

from vmm.cpu import binding as b
from vmm.cpu.layout import PROBE_PAGE, Probe

#: The byte's offset in the wheel for x86-64 Linux.
_OFFSET: Final = 2034
#: mov [rip + 0xff0], al; inc ebx; hlt
_CODE: Final = b"\x88\x05\xf0\x0f\x00\x00\xff\xc3\xf4"


def omit(engine: int) -> bool:
    """Have translations that an engine makes from now on ask at the end of a block only; whether they do."""
    if not can_be_omitted():
        return False
    ctypes.c_uint8.from_address(engine + _OFFSET).value = 1
    return True


@lru_cache(maxsize=1)
def can_be_omitted() -> bool:
    """Whether the byte is where it is known to be, and does that and nothing else. Takes some 10 ms, once."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return _stops_within_block(omitted=False) is True and _stops_within_block(omitted=True) is False


def _stops_within_block(*, omitted: bool) -> bool | None:
    """Whether an engine that is asked to stop by a store stops behind it; None if the place holds something else."""
    probe = Probe()
    try:
        place = ctypes.c_uint8.from_address(probe.engine + _OFFSET)
        if place.value:
            return None
        place.value = omitted
        probe.stop_at_stores()
        probe.write(b.REG_RBX, 0)
        probe.run(_CODE, PROBE_PAGE)
        return probe.read(b.REG_RBX) == 0
    finally:
        probe.close()
