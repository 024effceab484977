"""SYSCALL, as an Intel processor has it: in 64-bit mode only (SDM vol. 2, "SYSCALL")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.cpu.entry import AR_L, EFER_LMA, EFER_SCE, RFLAGS_RF
from vmm.cpu.events import Event, EventType, Vector
from vmm.cpu.state import Segment

if TYPE_CHECKING:
    from vmm.cpu.state import CpuState

_MASK = (1 << 64) - 1
#: Execute/read, accessed; S, P, DPL 0, L, G.
_CODE = 0xA09B
#: Read/write, accessed; S, P, DPL 0, B, G.
_DATA = 0xC093


def syscall(state: CpuState, *, star: int, lstar: int, fmask: int, length: int = 2) -> Event | None:
    """Enter the kernel; the MSRs are 64-bit values, ``length`` is that of the instruction in bytes.

    Returns the #UD to deliver, with nothing changed, outside of 64-bit mode and with EFER.SCE clear. The
    fixed segments are loaded without a look at the descriptor tables. CSTAR has no part in it.
    """
    in_64_bit_mode = state.efer & EFER_LMA and state.segment("cs").access_rights & AR_L
    if not (in_64_bit_mode and state.efer & EFER_SCE):
        return Event(Vector.UD, EventType.HARDWARE_EXCEPTION)
    selector = star >> 32 & 0xFFFF
    state.rcx = state.rip + length & _MASK
    state.r11 = state.rflags & ~RFLAGS_RF
    state.rip = lstar
    state.rflags &= ~(fmask | RFLAGS_RF)
    state.set_segment("cs", Segment(selector & 0xFFFC, 0, 0xFFFF_FFFF, _CODE))
    state.set_segment("ss", Segment(selector + 8 & 0xFFFF, 0, 0xFFFF_FFFF, _DATA))
    return None
