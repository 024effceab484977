"""The ACPI tables of a PC with APICs (ACPI 6.5, chapter 5): what firmware would leave in memory below 1 MiB.

::

    RSDP ──► RSDT ─┬─► FADT ─┬─► FACS
                   │         └─► DSDT: nothing but an empty scope
                   └─► MADT: the local APIC, the I/O APIC, how IRQ 0 and 9 are connected

ACPI is on from the start (there is no SMI command), and there are no sleep states.
"""

from __future__ import annotations

import struct
from typing import Final

from vmm.devices import acpi_pm, io_apic, local_apic
from vmm.pc_interrupts import IO_APIC_ID, TIMER_PIN

#: Where the tables start: in the area that is searched for an RSDP.
PLACE: Final = 0xF_0000

_HEADER: Final = 36
_OEM: Final = struct.pack("<6s8sI4sI", b"VMM", b"PC", 1, b"VMM", 1)
#: Scope (\_SB) {}
_EMPTY_SCOPE: Final = b"\x10\x06\\_SB_"

_FLAG_WBINVD, _FLAG_C1, _FLAG_NO_FIXED_POWER, _FLAG_NO_FIXED_SLEEP, _FLAG_NO_FIXED_CLOCK = (
    1 << bit for bit in (0, 2, 4, 5, 6)
)
#: Latencies, in microseconds, that say that there is no C2 and no C3.
_NO_C2, _NO_C3 = 101, 1001

_MADT_HAS_8259: Final = 1
_PROCESSOR_ENABLED: Final = 1
_ALL_PROCESSORS: Final = 0xFF
_AS_ON_ISA: Final = 0
_ACTIVE_HIGH_LEVEL: Final = 0b1101


def tables() -> bytes:
    """All tables, to be put at ``PLACE``."""
    facs_at = PLACE + 64
    facs = struct.pack("<4sI56x", b"FACS", 64)
    dsdt_at = facs_at + len(facs)
    dsdt = _table(b"DSDT", 1, _EMPTY_SCOPE)
    fadt_at = dsdt_at + _aligned(dsdt)
    fadt = _table(b"FACP", 1, _fadt(facs_at, dsdt_at))
    madt_at = fadt_at + _aligned(fadt)
    madt = _table(b"APIC", 1, _madt())
    rsdt_at = madt_at + _aligned(madt)
    rsdt = _table(b"RSDT", 1, struct.pack("<II", fadt_at, madt_at))
    parts = {PLACE: _rsdp(rsdt_at), facs_at: facs, dsdt_at: dsdt, fadt_at: fadt, madt_at: madt, rsdt_at: rsdt}
    image = bytearray(rsdt_at + len(rsdt) - PLACE)
    for address, data in parts.items():
        image[address - PLACE : address - PLACE + len(data)] = data
    return bytes(image)


def _aligned(data: bytes) -> int:
    return -(-len(data) // 16) * 16


def _rsdp(rsdt: int) -> bytes:
    """The root system description pointer of ACPI 1.0."""
    return _summed(struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"VMM", 0, rsdt), 8)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header."""
    return _summed(struct.pack("<4sIBB", signature, _HEADER + len(body), revision, 0) + _OEM + body, 9)


def _summed(data: bytes, place: int) -> bytes:
    """The same with its checksum at a place that was 0: all bytes add up to 0."""
    return data[:place] + bytes((-sum(data) & 0xFF,)) + data[place + 1 :]


def _fadt(facs: int, dsdt: int) -> bytes:
    """The fixed ACPI description table of ACPI 1.0, behind its header."""
    events, control, timer = (acpi_pm.FIRST_PORT + at for at in (acpi_pm.EVENTS, acpi_pm.CONTROL, acpi_pm.TIMER))
    flags = _FLAG_WBINVD | _FLAG_C1 | _FLAG_NO_FIXED_POWER | _FLAG_NO_FIXED_SLEEP | _FLAG_NO_FIXED_CLOCK
    return b"".join(
        (
            struct.pack("<IIBxH8x", facs, dsdt, 0, acpi_pm.IRQ),
            struct.pack("<8I", events, 0, control, 0, 0, timer, 0, 0),
            struct.pack("<8B", 4, 2, 0, 4, 0, 0, 0, 0),
            struct.pack("<HH12xI", _NO_C2, _NO_C3, flags),
        )
    )


def _madt() -> bytes:
    """The multiple APIC description table, behind its header."""
    return b"".join(
        (
            struct.pack("<II", local_apic.BASE, _MADT_HAS_8259),
            struct.pack("<BBBBI", 0, 8, 0, local_apic.ID, _PROCESSOR_ENABLED),
            struct.pack("<BBBxII", 1, 12, IO_APIC_ID, io_apic.BASE, 0),
            struct.pack("<BBBBIH", 2, 10, 0, 0, TIMER_PIN, _AS_ON_ISA),
            struct.pack("<BBBBIH", 2, 10, 0, acpi_pm.IRQ, acpi_pm.IRQ, _ACTIVE_HIGH_LEVEL),
            struct.pack("<BBBHB", 4, 6, _ALL_PROCESSORS, _AS_ON_ISA, local_apic.LINT1),
        )
    )
