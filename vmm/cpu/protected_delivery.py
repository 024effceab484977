"""Event delivery in real, virtual-8086 and protected mode (SDM vol. 2, "INT n"; vol. 3, 6.12 and 22.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from vmm.cpu.descriptors import Tables
from vmm.cpu.entry import (
    CR4_VME,
    NULL_SEGMENT,
    RFLAGS_AC,
    RFLAGS_IF,
    RFLAGS_TF,
    RFLAGS_VM,
    Entry,
    handler_rflags,
    saved_rflags,
    saved_rip,
)
from vmm.cpu.events import EventType, GuestFault, Vector
from vmm.cpu.gates import find_code_segment, find_gate, handler_cpl
from vmm.cpu.stack import Stack
from vmm.cpu.state import Segment, SegmentName
from vmm.errors import GuestError

if TYPE_CHECKING:
    from vmm.cpu.descriptors import Descriptor
    from vmm.cpu.entry import Write
    from vmm.cpu.events import Event
    from vmm.cpu.gates import Gate
    from vmm.cpu.state import CpuState, LinearMemory

_V86_SEGMENTS: tuple[SegmentName, ...] = ("gs", "fs", "ds", "es")


def enter_in_real_mode(state: CpuState, memory: LinearMemory, event: Event) -> Entry:
    """Plan the delivery through the interrupt vector table, without an error code (SDM vol. 3, 22.1.4).

    Raises ``GuestFault`` and ``PageFault``; changes nothing.
    """
    tables = Tables(state, memory, event.ext)
    base, limit = state.idtr
    if event.vector * 4 + 3 > limit:
        raise GuestFault(Vector.GP, 0)
    far_pointer = tables.read(base + event.vector * 4, 4)
    selector, ip = far_pointer >> 16, far_pointer & 0xFFFF
    old = state.segment("cs")
    frame = (saved_rflags(state, event), old.selector, saved_rip(state, event))
    pushed = Stack(state.segment("ss"), state.rsp & 0xFFFF_FFFF, user=False).push(frame, 2)
    if pushed is None:
        raise GuestFault(Vector.SS, 0)
    if ip > old.limit:
        raise GuestFault(Vector.GP, 0)
    return Entry(
        pushed[0],
        rip=ip,
        rsp=pushed[1],
        rflags=state.rflags & ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_AC),
        segments=(("cs", Segment(selector, selector << 4, old.limit, old.access_rights)),),
    )


def enter_in_protected_mode(state: CpuState, memory: LinearMemory, event: Event) -> Entry:
    """Plan the delivery through an interrupt or trap gate of 16 or 32 bits, also from virtual-8086 mode.

    Raises ``GuestFault`` and ``PageFault``, and ``GuestError`` for task gates and for INT n in virtual-8086
    mode with CR4.VME, which the VMM does not deliver. Changes nothing.
    """
    _check_virtual_8086_interrupt(state, event)
    tables = Tables(state, memory, event.ext)
    cpl = state.cpl
    gate = find_gate(tables, event, cpl)
    if gate.is_task_gate:
        raise GuestError(
            f"vector {event.vector:#x} at RIP {state.rip:#x} goes through a task gate: "
            "the VMM has no task switch"
        )
    code = find_code_segment(tables, gate, cpl)
    new_cpl = handler_cpl(code, cpl)
    if state.rflags & RFLAGS_VM and new_cpl != 0:
        raise tables.fault(Vector.GP, gate.selector)
    target = _inner_stack(tables, new_cpl) if new_cpl != cpl else _same_stack(tables, cpl)
    return _enter(tables, event, gate, code, target)


def _check_virtual_8086_interrupt(state: CpuState, event: Event) -> None:
    """INT n in virtual-8086 mode needs IOPL 3 (SDM vol. 3, 22.3.3)."""
    if event.type is not EventType.SOFTWARE_INTERRUPT or not state.rflags & RFLAGS_VM:
        return
    if state.cr4 & CR4_VME:
        raise GuestError(
            f"INT {event.vector:#x} at RIP {state.rip:#x} in virtual-8086 mode with CR4.VME: "
            "the VMM has no interrupt redirection"
        )
    if state.rflags >> 12 & 3 != 3:
        raise GuestFault(Vector.GP, 0)


@frozen(slots=True)
class _Target:
    """The handler's stack. ``descriptor`` is None where SS stays as it is."""

    cpl: int
    stack: Stack
    descriptor: Descriptor | None

    @property
    def fault_selector(self) -> int:
        """What #SS names: the new stack segment, or nothing."""
        return self.stack.segment.selector if self.descriptor else 0


def _same_stack(tables: Tables, cpl: int) -> _Target:
    pointer = tables.state.rsp & 0xFFFF_FFFF
    return _Target(cpl, Stack(tables.state.segment("ss"), pointer, user=cpl == 3), None)


def _inner_stack(tables: Tables, cpl: int) -> _Target:
    """Find the stack of a more privileged level out of the TSS, checked (SDM vol. 3, 5.8.5)."""
    selector, pointer = _tss_stack(tables, cpl)
    if not selector & 0xFFFC:
        raise tables.fault(Vector.TS)
    descriptor = tables.descriptor(selector, outside=Vector.TS)
    if selector & 3 != cpl or descriptor.dpl != cpl or not descriptor.is_writable_data:
        raise tables.fault(Vector.TS, selector)
    if not descriptor.present:
        raise tables.fault(Vector.SS, selector)
    return _Target(cpl, Stack(descriptor.segment(selector, cpl), pointer, user=False), descriptor)


def _tss_stack(tables: Tables, cpl: int) -> tuple[int, int]:
    """(SS, ESP): 4 + 2 bytes at 4, 12, 20 of a 32-bit TSS, 2 + 2 bytes at 2, 6, 10 of a 16-bit TSS."""
    if tables.tss_is_32_bit:
        field = tables.tss(4 + 8 * cpl, 6)
        return field >> 32, field & 0xFFFF_FFFF
    field = tables.tss(2 + 4 * cpl, 4)
    return field >> 16, field & 0xFFFF


def _enter(tables: Tables, event: Event, gate: Gate, code: Descriptor, target: _Target) -> Entry:
    state = tables.state
    new_cs = code.segment(gate.selector, target.cpl)
    pushed = target.stack.push(_frame(state, event, switch=target.descriptor is not None), gate.operand_size)
    if pushed is None:
        raise tables.fault(Vector.SS, target.fault_selector)
    if gate.offset > new_cs.limit:
        raise tables.fault(Vector.GP)
    return Entry(
        (*_mark_accessed(tables, code, target), *pushed[0]),
        rip=gate.offset,
        rsp=pushed[1],
        rflags=handler_rflags(state, interrupt_gate=gate.is_interrupt_gate),
        segments=_loaded_segments(state, new_cs, target),
    )


def _frame(state: CpuState, event: Event, *, switch: bool) -> list[int]:
    """List what is pushed, in this order; the data segments only when virtual-8086 mode is left."""
    frame = []
    if state.rflags & RFLAGS_VM:
        frame += [state.segment(name).selector for name in _V86_SEGMENTS]
    if switch:
        frame += [state.segment("ss").selector, state.rsp]
    frame += [saved_rflags(state, event), state.segment("cs").selector, saved_rip(state, event)]
    if event.error_code is not None:
        frame.append(event.error_code)
    return frame


def _mark_accessed(tables: Tables, code: Descriptor, target: _Target) -> list[Write]:
    stack = tables.mark_accessed(target.descriptor) if target.descriptor else ()
    return [*tables.mark_accessed(code), *stack]


def _loaded_segments(
    state: CpuState, new_cs: Segment, target: _Target
) -> tuple[tuple[SegmentName, Segment], ...]:
    loaded: list[tuple[SegmentName, Segment]] = [("cs", new_cs)]
    if target.descriptor:
        loaded.append(("ss", target.stack.segment))
    if state.rflags & RFLAGS_VM:
        loaded += [(name, NULL_SEGMENT) for name in _V86_SEGMENTS]
    return tuple(loaded)
