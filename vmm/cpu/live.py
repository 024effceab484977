"""The processor state of an engine while it runs, as callbacks need it."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from typing import Final

from vmm.cpu import binding as b
from vmm.cpu import layout as at
from vmm.cpu.context import EFER_LMA, EFLAGS_IN_MODE, RFLAGS_VM, mode_name

#: From ``layout.HFLAGS`` on: hflags, CR0, CR3, CR4, EFER in one go.
_CONTROL: Final = struct.Struct(
    f"<I{at.CONTROL - at.HFLAGS - 4}xQ16xQQ{at.EFER - at.CONTROL - 40}xQ"
).unpack_from
_FLAGS: Final = struct.Struct("<I").unpack_from
_RFLAGS_IF: Final = 1 << 9


class LiveState:
    """Control registers, mode and RIP of a running engine.

    Where the engine's own state can be found (see ``layout.live_state``), fields are read in place; elsewhere each
    ``refresh`` takes a copy (0.6 us), so that this works on any build.
    """

    def __init__(self, engine: int) -> None:
        self._engine = engine
        pointer = ctypes.c_void_p()
        b.check(b.context_alloc(engine, ctypes.byref(pointer)), "uc_context_alloc")
        assert pointer.value is not None
        self._copy: Final = pointer.value
        b.check(b.context_save(engine, self._copy), "uc_context_save")
        place = at.live_state(engine, self._copy)
        #: What the offsets in ``layout`` are from where the fields are read in place; None elsewhere.
        self.address: Final = place
        self.in_place: Final = place is not None
        base = self._copy if place is None else place
        self._fields = memoryview((ctypes.c_uint8 * at.CONTEXT_SIZE).from_address(base))

    def __del__(self) -> None:
        copy = getattr(self, "_copy", None)
        if copy is not None and b is not None:
            b.context_free(copy)

    def refresh(self) -> None:
        """Bring the fields up to date."""
        if not self.in_place:
            b.context_save(self._engine, self._copy)

    def control(self) -> tuple[int, int, int, int, bool]:
        """(CR0, CR3, CR4, EFER, whether code runs in ring 3)."""
        if not self.in_place:
            self.refresh()
        hflags, cr0, cr3, cr4, efer = _CONTROL(self._fields, at.HFLAGS)
        return cr0, cr3, cr4, efer, hflags & 3 == 3

    def takes_interrupts(self) -> bool:
        """Whether an external interrupt could be taken now, at a boundary: RFLAGS.IF set, and no interrupt shadow."""
        if not self.in_place:
            self.refresh()
        (eflags,), (hflags,) = _FLAGS(self._fields, at.EFLAGS), _FLAGS(self._fields, at.HFLAGS)
        return bool(eflags & _RFLAGS_IF) and not hflags & at.HF_INHIBIT_IRQ

    def mode(self) -> tuple[int, str]:
        """The digest of CPU mode that translations depend on, and the mode in words."""
        if not self.in_place:
            self.refresh()
        hflags, _, _, _, efer = _CONTROL(self._fields, at.HFLAGS)
        (eflags,) = _FLAGS(self._fields, at.EFLAGS)
        return _mode(hflags, eflags & EFLAGS_IN_MODE, efer & EFER_LMA)


@lru_cache
def _mode(hflags: int, eflags: int, long_mode: int) -> tuple[int, str]:
    virtual = not long_mode and bool(eflags & RFLAGS_VM)
    return hflags | eflags, mode_name(hflags, virtual_8086=virtual)
