"""Events that go through the guest's IDT, and what two of them make together (SDM vol. 3, chapter 6)."""

from __future__ import annotations

import enum

from attrs import frozen

from vmm.errors import OptionError, VmmError

DR6_BD = 1 << 13
DR6_BS = 1 << 14


class Vector(enum.IntEnum):
    """Vectors of the architectural exceptions and of NMI (SDM vol. 3, table 6-1)."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21


class EventType(enum.IntEnum):
    """Interruption types of the VM-entry interruption-information field (SDM vol. 3, table 25-17)."""

    EXTERNAL_INTERRUPT = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    """INT n"""
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    """INT1"""
    SOFTWARE_EXCEPTION = 6
    """INT3 and INTO"""
    OTHER_EVENT = 7
    """A pending MTF VM exit, with vector 0: nothing is delivered"""


_FAULTS = frozenset(Vector) - {
    Vector.DB, Vector.NMI, Vector.BP, Vector.OF, Vector.DF, Vector.MC,
}  # fmt: skip
_CONTRIBUTORY = frozenset({Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.CP})
_PAGE_FAULTS = frozenset({Vector.PF, Vector.VE})
#: Types whose saved RIP is the instruction after the one that caused the event.
_AFTER_INSTRUCTION = frozenset(
    {
        EventType.SOFTWARE_INTERRUPT,
        EventType.PRIVILEGED_SOFTWARE_EXCEPTION,
        EventType.SOFTWARE_EXCEPTION,
    }
)


@frozen(slots=True)
class Event:
    """One interrupt or exception.

    ``vector`` is 0 to 255. ``error_code`` is None for an event that pushes none. ``length`` is that of the
    instruction, 0 to 15 bytes, and counts for the three software types only. ``cr2`` is what a page fault
    puts in CR2, ``dr6`` the bits that a debug exception sets in DR6. Raises ``OptionError`` on a value out of
    range.
    """

    vector: int
    type: EventType
    error_code: int | None = None
    length: int = 0
    cr2: int | None = None
    dr6: int = 0

    def __attrs_post_init__(self) -> None:
        """Refuse what no processor could deliver."""
        _in_range("vector", self.vector, 0 if self.type is EventType.OTHER_EVENT else 0xFF)
        _in_range("error code", self.error_code or 0, 0xFFFF_FFFF)
        _in_range("instruction length", self.length, 15)
        _in_range("CR2", self.cr2 or 0, (1 << 64) - 1)
        _in_range("DR6", self.dr6, 0xFFFF_FFFF)

    @property
    def is_exception(self) -> bool:
        """Detected by the processor, not asked for by the program (INT n) or from outside."""
        return self.type is EventType.HARDWARE_EXCEPTION

    @property
    def pushes_rf(self) -> bool:
        """Whether RF is 1 in the pushed flags, whatever it was (SDM vol. 3, 17.3.1.1).

        So it is for every fault but an instruction breakpoint. Any other event pushes RF as it is.
        """
        if self.vector == Vector.DB:
            return self.is_exception and bool(self.dr6 & DR6_BD)
        return self.is_exception and self.vector in _FAULTS

    @property
    def return_offset(self) -> int:
        """What to add to RIP, in bytes, for the address that the handler returns to."""
        return self.length if self.type in _AFTER_INSTRUCTION else 0

    @property
    def checks_gate_dpl(self) -> bool:
        """Whether the gate's DPL must allow the event: INT n, INT3 and INTO, but not INT1."""
        return self.type in (EventType.SOFTWARE_INTERRUPT, EventType.SOFTWARE_EXCEPTION)

    @property
    def ext(self) -> int:
        """The EXT bit of error codes of faults while this event is delivered (SDM vol. 3, 6.13)."""
        return 0 if self.checks_gate_dpl else 1


def _in_range(name: str, value: int, highest: int) -> None:
    if not 0 <= value <= highest:
        raise OptionError(f"{name} {value:#x} is out of range", where="event", fix=f"use 0 to {highest:#x}")


class GuestFault(Exception):  # noqa: N818 - a fault of the guest, not an error of the VMM
    """A check of the event's delivery failed: ``event`` is the exception that the guest gets for it."""

    def __init__(self, vector: Vector, error_code: int) -> None:
        self.event = Event(vector, EventType.HARDWARE_EXCEPTION, error_code)
        super().__init__(f"#{vector.name}({error_code:#x})")


class TripleFault(VmmError):  # noqa: N818 - the architectural name
    """An exception while a double fault was delivered: the processor shuts down (SDM vol. 3, 6.15).

    ``events`` are the events whose delivery failed, in order; the last is the double fault.
    """

    def __init__(self, events: tuple[Event, ...]) -> None:
        self.events = events
        super().__init__("triple fault: " + ", then ".join(f"vector {event.vector}" for event in events))


def combine(first: Event, second: Event) -> Event:
    """Choose what to deliver when ``second`` arises while ``first`` is delivered (SDM vol. 3, table 6-5).

    ============  =============  ===================  =================
    first         second benign  second contributory  second page fault
    ============  =============  ===================  =================
    benign        second         second               second
    contributory  second         double fault         second
    page fault    second         double fault         double fault
    double fault  second         triple fault         triple fault
    ============  =============  ===================  =================

    Raises ``TripleFault``.
    """
    serious = _is(second, _CONTRIBUTORY | _PAGE_FAULTS)
    if _is(first, {Vector.DF}) and serious:
        raise TripleFault((first,))
    if _is(first, _PAGE_FAULTS) and serious:
        return DOUBLE_FAULT
    if _is(first, _CONTRIBUTORY) and _is(second, _CONTRIBUTORY):
        return DOUBLE_FAULT
    return second


DOUBLE_FAULT = Event(Vector.DF, EventType.HARDWARE_EXCEPTION, 0)


def _is(event: Event, vectors: frozenset[Vector] | set[Vector]) -> bool:
    return event.is_exception and event.vector in vectors
