"""The entry into an event handler as a plan: everything that will change, decided before anything does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from vmm.cpu.state import Segment, SegmentName

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.cpu.events import Event
    from vmm.cpu.state import CpuState, LinearMemory

CR0_PE = 1 << 0
CR4_VME = 1 << 0
CR4_LA57 = 1 << 12
EFER_SCE = 1 << 0
EFER_LMA = 1 << 10

RFLAGS_TF = 1 << 8
RFLAGS_IF = 1 << 9
RFLAGS_NT = 1 << 14
RFLAGS_RF = 1 << 16
RFLAGS_VM = 1 << 17
RFLAGS_AC = 1 << 18

#: Access rights of a segment register (the table is at ``Segment``).
AR_ACCESSED = 1 << 0
AR_P = 1 << 7
AR_L = 1 << 13
AR_D = 1 << 14

NULL_SEGMENT = Segment(0, 0, 0, 0)


@frozen(slots=True)
class Write:
    """One write to guest-linear memory that does not wrap around the end of the address space."""

    address: int
    data: bytes
    user: bool


@frozen(slots=True)
class Entry:
    """Writes in their order, then registers; ``segments`` is in the order in which they are loaded."""

    writes: tuple[Write, ...]
    rip: int
    rsp: int
    rflags: int
    segments: tuple[tuple[SegmentName, Segment], ...]

    def commit(self, state: CpuState, memory: LinearMemory) -> None:
        """Make the entry happen, or raise ``PageFault`` with nothing changed.

        One case is not atomic: a guest whose handler stack lies in its own page tables can make a later write
        fault by an earlier one. A processor has the translations of both by then and would go on.
        """
        if len(self.writes) > 1:
            for write in self.writes:
                memory.check_write(write.address, len(write.data), user=write.user)
        for write in self.writes:
            memory.write(write.address, write.data, user=write.user)
        state.rflags = self.rflags
        for name, segment in self.segments:
            state.set_segment(name, segment)
        state.rsp = self.rsp
        state.rip = self.rip


def split_at_wrap(address: int, size: int, bits: int) -> tuple[tuple[int, int], ...]:
    """(address, size) of the one or two pieces of an access in an address space of ``bits`` bits."""
    address &= (1 << bits) - 1
    room = (1 << bits) - address
    if size <= room:
        return ((address, size),)
    return ((address, room), (0, size - room))


def wrapped_writes(address: int, data: bytes, bits: int, *, user: bool) -> Iterable[Write]:
    """Make the writes of ``data`` at ``address``, in two pieces where it wraps."""
    done = 0
    for start, size in split_at_wrap(address, len(data), bits):
        yield Write(start, data[done : done + size], user)
        done += size


def saved_rflags(state: CpuState, event: Event) -> int:
    """Compute the flags image that the handler finds on its stack."""
    return state.rflags | RFLAGS_RF if event.pushes_rf else state.rflags


def saved_rip(state: CpuState, event: Event) -> int:
    """Compute the address that the handler returns to, as wide as the interrupted code (64 or 32 bits)."""
    in_64_bit_mode = state.efer & EFER_LMA and state.segment("cs").access_rights & AR_L
    mask = (1 << 64) - 1 if in_64_bit_mode else 0xFFFF_FFFF
    return state.rip + event.return_offset & mask


def handler_rflags(state: CpuState, *, interrupt_gate: bool) -> int:
    """Compute the flags that the handler starts with (SDM vol. 3, 6.12.1.3)."""
    cleared = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM
    return state.rflags & ~(cleared | RFLAGS_IF if interrupt_gate else cleared)
