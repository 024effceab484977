"""The processor state of an engine while it runs, as callbacks need it."""

from __future__ import annotations

import ctypes
from typing import Final

from vmm.cpu import binding as b
from vmm.cpu import layout as at
from vmm.cpu.context import EFLAGS_IN_MODE, EFER_LMA, RFLAGS_VM, mode_name


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
        #: Whether fields are read in place.
        self.in_place: Final = place is not None
        base = self._copy if place is None else place
        self._control = (b.u64 * 5).from_address(base + at.CONTROL)
        self._efer = b.u64.from_address(base + at.EFER)
        self._hflags = ctypes.c_uint32.from_address(base + at.HFLAGS)
        self._eflags = ctypes.c_uint32.from_address(base + at.EFLAGS)

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
        self.refresh()
        cr0, _, _, cr3, cr4 = self._control
        return cr0, cr3, cr4, self._efer.value, self._hflags.value & 3 == 3

    def mode(self) -> tuple[int, str]:
        """The digest of CPU mode that translations depend on, and the mode in words."""
        self.refresh()
        hflags, eflags = self._hflags.value, self._eflags.value
        virtual = not self._efer.value & EFER_LMA and bool(eflags & RFLAGS_VM)
        return hflags | eflags & EFLAGS_IN_MODE, mode_name(hflags, virtual_8086=virtual)
