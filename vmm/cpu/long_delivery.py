"""Event delivery in IA-32e mode (SDM vol. 3, 6.14), from 64-bit and from compatibility mode."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmm.cpu.descriptors import Tables
from vmm.cpu.entry import Entry, handler_rflags, saved_rflags, saved_rip, wrapped_writes
from vmm.cpu.events import Vector
from vmm.cpu.gates import find_code_segment, find_gate, handler_cpl
from vmm.cpu.state import Segment, SegmentName

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.cpu.entry import Write
    from vmm.cpu.events import Event
    from vmm.cpu.gates import Gate
    from vmm.cpu.state import CpuState, LinearMemory

_MASK = (1 << 64) - 1

# 64-bit TSS: RSP0, RSP1, RSP2 at 4, 12, 20; IST1 to IST7 at 36, 44, ... 84 (SDM vol. 3, figure 8-11).
_TSS_RSP0 = 4
_TSS_IST1 = 36


def enter_in_long_mode(state: CpuState, memory: LinearMemory, event: Event) -> Entry:
    """Plan the delivery of ``event``. Raises ``GuestFault`` and ``PageFault``; changes nothing."""
    tables = Tables(state, memory, event.ext)
    cpl = state.cpl
    gate = find_gate(tables, event, cpl)
    code = find_code_segment(tables, gate, cpl)
    new_cpl = handler_cpl(code, cpl)
    top = _stack_top(tables, gate, cpl, new_cpl)
    frame = _frame(state, event)
    rsp = top - len(frame) & _MASK
    if not tables.is_canonical(rsp):
        raise tables.fault(Vector.SS)
    if not tables.is_canonical(gate.offset):
        raise tables.fault(Vector.GP)
    writes: tuple[Write, ...] = (
        *tables.mark_accessed(code),
        *wrapped_writes(rsp, frame, 64, user=new_cpl == 3),
    )
    return Entry(
        writes,
        rip=gate.offset,
        rsp=rsp,
        rflags=handler_rflags(state, interrupt_gate=gate.is_interrupt_gate),
        segments=(("cs", code.segment(gate.selector, new_cpl)), *_new_ss(cpl, new_cpl)),
    )


def _stack_top(tables: Tables, gate: Gate, cpl: int, new_cpl: int) -> int:
    """Find RSP before the first push, aligned to 16 bytes (SDM vol. 3, 6.14.2)."""
    if gate.ist:
        rsp = tables.tss(_TSS_IST1 + 8 * (gate.ist - 1), 8)
    elif new_cpl != cpl:
        rsp = tables.tss(_TSS_RSP0 + 8 * new_cpl, 8)
    else:
        rsp = tables.state.rsp
    if not tables.is_canonical(rsp):
        raise tables.fault(Vector.SS)
    return rsp & ~15


def _frame(state: CpuState, event: Event) -> bytes:
    """Build what the handler finds at RSP, in ascending order: 8-byte slots, SS:RSP always among them."""
    registers = (
        saved_rip(state, event),
        state.segment("cs").selector,
        saved_rflags(state, event),
        state.rsp,
        state.segment("ss").selector,
    )
    error_code = () if event.error_code is None else (event.error_code,)
    return struct.pack(f"<{len(error_code) + 5}Q", *error_code, *registers)


def _new_ss(cpl: int, new_cpl: int) -> Iterable[tuple[SegmentName, Segment]]:
    """SS is null with RPL = CPL after a change of privilege, otherwise as it was, IST or not (6.14.4)."""
    if new_cpl != cpl:
        yield "ss", Segment(new_cpl, base=0, limit=0, access_rights=new_cpl << 5)
