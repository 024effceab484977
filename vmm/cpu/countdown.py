"""Stopping a free-running engine at a block that is a function of what it has executed, and of nothing else.

The engine calls its block hook at each entry of a block. A Python callback there would make it ten times slower, so the
callback is 54 bytes of host machine code, which count down a cell of memory: 4 ns an entry. Where such code cannot be
had (another processor or operating system, or the engine's flags not found in place) a Python function does the same.

::

    at each entry of a block:
        remaining -= 1;                    if remaining >= 0: go on
        if waits:
            patience -= 1
            if patience >= 0 and (RFLAGS.IF is 0 or an interrupt shadow is on): go on
        fired = 1; stop the engine before this block (quirk "block-stop")

STI, POPF, IRET, SYSRET and loads of SS end a block in the engine. So with ``waits`` the stop is exactly at the first
boundary at which an external interrupt can be taken.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from vmm.cpu import binding as b
from vmm.cpu import layout as at
from vmm.cpu.live import LiveState
from vmm.cpu.machine_code import placed

#: How many blocks an engine may execute while it waits for a boundary that can take an interrupt.
PATIENCE: Final = 1 << 20

_RFLAGS_IF: Final = 1 << 9
# System V calling convention: engine in RDI (and so the argument of uc_emu_stop), the cell in RCX.
_CODE: Final = bytes.fromhex(
    "48832901"          #       sub  qword ptr [rcx], 1
    "7801"              #       js   1f
    "c3"                # go:   ret
    "4883791000"        # 1:    cmp  qword ptr [rcx + 16], 0
    "741d"              #       je   stop
    "4883690801"        #       sub  qword ptr [rcx + 8], 1
    "7816"              #       js   stop
    "488b4120"          #       mov  rax, [rcx + 32]
    "f70000020000"      #       test dword ptr [rax], 0x200
    "7409"              #       je   2f
    "488b4128"          #       mov  rax, [rcx + 40]
    "f60008"            #       test byte ptr [rax], 8
    "7401"              #       je   stop
    "c3"                # 2:    ret
    "48c7411801000000"  # stop: mov  qword ptr [rcx + 24], 1
    "ff6130"            #       jmp  [rcx + 48]
)  # fmt: skip


class _Cell(ctypes.Structure):
    """What the callback counts in, and what it needs to know."""

    _fields_ = (
        ("remaining", ctypes.c_int64),
        ("patience", ctypes.c_int64),
        ("waits", ctypes.c_uint64),
        ("fired", ctypes.c_uint64),
        ("eflags", ctypes.c_void_p),
        ("hflags", ctypes.c_void_p),
        ("stop", ctypes.c_void_p),
    )


class Countdown:
    """Counts the blocks that an engine enters, and stops it when they are enough.

    ``native`` asks for the machine code; it is used where it can be.
    """

    def __init__(self, live: LiveState, *, native: bool = True) -> None:
        self._cell: Final = _Cell(stop=ctypes.cast(b.emu_stop, ctypes.c_void_p).value)
        self._live: Final = live
        self._before = 0
        self._given = 0
        code = placed(_CODE) if native and live.address is not None else None
        #: Whether the callback is machine code.
        self.native: Final = code is not None
        if live.address is not None:
            self._cell.eflags, self._cell.hflags = live.address + at.EFLAGS, live.address + at.HFLAGS
        #: For ``uc_hook_add``: the callback, and its user data.
        self.callback: Final[Any] = b.BlockEntry(self._enter) if code is None else b.BlockEntry(code)
        self.user_data: Final[Any] = ctypes.byref(self._cell)

    def begin(self, blocks: int, *, waits: bool) -> None:
        """Let the engine enter so many blocks, 0 or more, before it is stopped; with ``waits`` see the module."""
        self._before, self._given = self.entered, blocks
        self._cell.remaining, self._cell.patience = blocks, PATIENCE
        self._cell.waits, self._cell.fired = waits, 0

    def interrupt(self) -> None:
        """Stop the running engine at the first boundary that can take an interrupt; for callbacks of the engine."""
        self.begin(0, waits=True)

    def hurry(self) -> None:
        """Stop the engine at the next block; from any thread. Entries are not counted rightly any more.

        An entry at the same moment may undo this; then the engine is stopped when it would have been anyway.
        """
        self._cell.waits, self._cell.remaining = 0, 0

    def spend(self, blocks: int) -> None:
        """Count blocks that were executed in another way."""
        self._before += blocks

    @property
    def fired(self) -> bool:
        """Whether the engine was stopped here since ``begin``."""
        return bool(self._cell.fired)

    @property
    def entered(self) -> int:
        """Blocks entered so far; the one that the engine was stopped before is not."""
        return self._before + self._given - int(self._cell.remaining) - int(self._cell.fired)

    def _enter(self, engine: int, _address: int, _size: int, _data: int) -> None:
        cell = self._cell
        cell.remaining -= 1
        if cell.remaining >= 0:
            return
        if cell.waits:
            cell.patience -= 1
            if cell.patience >= 0 and not self._live.takes_interrupts():
                return
        cell.fired = 1
        b.emu_stop(engine)
