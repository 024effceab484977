"""Event delivery through the guest's own IDT (SDM vol. 3, chapter 6; vol. 2, "INT n").

::

    deliver ── real mode ───────────── enter_in_real_mode ──────┐
        │   ├─ protected, v8086 ────── enter_in_protected_mode ─┼─ Entry.commit
        │   └─ IA-32e mode ─────────── enter_in_long_mode ──────┘
        └── a fault on the way ─────── combine, and once more

Nothing of the guest changes before every check of the delivery has passed. Deviations from hardware: no task
switch, no interrupt redirection for virtual-8086 mode (both raise ``GuestError``), no alignment checks, no
shadow stacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from vmm.cpu.entry import CR0_PE, EFER_LMA, Entry
from vmm.cpu.events import Event, EventType, GuestFault, TripleFault, Vector, combine
from vmm.cpu.long_delivery import enter_in_long_mode
from vmm.cpu.protected_delivery import enter_in_protected_mode, enter_in_real_mode
from vmm.paging.access import PageFault

if TYPE_CHECKING:
    from vmm.cpu.state import CpuState, LinearMemory

__all__ = ["Delivered", "Event", "EventType", "TripleFault", "Vector", "combine", "deliver"]

_DR6_BREAKPOINTS = 0xF
_DR7_GD = 1 << 13


@frozen(slots=True)
class Delivered:
    """How a delivery went: ``events`` in the order in which they arose.

    The last one is the event whose handler now runs; each one before it was replaced because its own delivery
    faulted.
    """

    events: tuple[Event, ...]

    @property
    def event(self) -> Event:
        """The event whose handler now runs."""
        return self.events[-1]


def deliver(state: CpuState, memory: LinearMemory, event: Event) -> Delivered:
    """Deliver ``event``, or what its delivery leads to, so that the guest goes on in the handler.

    ``state.rip`` is that of the instruction which a fault or a software interrupt belongs to, and the next
    one for a trap or an interrupt; ``state.rflags`` has RF set where an interrupt comes between two
    iterations of a string instruction (SDM vol. 3, 17.3.1.1). CR2 and DR6 are set when a page fault
    or debug exception arises; everything else changes only with the event that is delivered in the end.

    Raises ``TripleFault`` when nothing can be delivered any more, ``GuestError`` for a deviation named above.
    """
    events = [event]
    _note_cause(state, event)
    while True:
        try:
            _plan(state, memory, event).commit(state, memory)
        except GuestFault as fault:
            nested = fault.event
        except PageFault as fault:
            nested = Event(Vector.PF, EventType.HARDWARE_EXCEPTION, fault.error_code, cr2=fault.address)
        else:
            _forbid_general_detect(state, event)
            return Delivered(tuple(events))
        _note_cause(state, nested)
        event = _combine(events, nested)
        events.append(event)


def _plan(state: CpuState, memory: LinearMemory, event: Event) -> Entry:
    if not state.cr0 & CR0_PE:
        return enter_in_real_mode(state, memory, event)
    if state.efer & EFER_LMA:
        return enter_in_long_mode(state, memory, event)
    return enter_in_protected_mode(state, memory, event)


def _combine(events: list[Event], nested: Event) -> Event:
    try:
        return combine(events[-1], nested)
    except TripleFault:
        raise TripleFault(tuple(events)) from None


def _note_cause(state: CpuState, event: Event) -> None:
    """Set what a page fault and a debug exception report, also when a double fault replaces them."""
    if event.cr2 is not None:
        state.cr2 = event.cr2
    if event.is_exception and event.vector == Vector.DB:
        state.dr6 = state.dr6 & ~_DR6_BREAKPOINTS | event.dr6


def _forbid_general_detect(state: CpuState, event: Event) -> None:
    """Let the handler of a debug exception use the debug registers (SDM vol. 3, 17.2.4)."""
    if event.is_exception and event.vector == Vector.DB:
        state.dr7 &= ~_DR7_GD
