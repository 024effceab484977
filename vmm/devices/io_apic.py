"""The I/O APIC: 24 pins, each with a redirection entry that makes a message of it (Intel 82093AA data sheet).

Two registers in memory lead to all others: IOREGSEL at offset 0x00 selects one, IOWIN at offset 0x10 is it.

============  ============================================================================
selected      register
============  ============================================================================
0x00          ID, bits 27:24
0x01          version 0x11, and the number of the last pin
0x02          arbitration ID: the same as the ID
0x10 + 2n     redirection entry of pin n, low half: bits 7:0 vector, 10:8 delivery mode,
              11 logical destination, 12 delivery status, 13 active low, 14 remote IRR,
              15 level-triggered, 16 masked
0x11 + 2n     its high half: bits 31:24 destination
============  ============================================================================

An edge at a masked pin is lost. A level is sent as long as the pin is active, but not again before the local APIC has
told of the end of the interrupt (EOI broadcast). Messages are accepted at once, so that the delivery status is always
idle. Entries with delivery mode ExtINT, SMI or INIT send nothing that the processor would follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmm.devices.local_apic import Message

BASE: Final = 0xFEC0_0000
PINS: Final = 24

_VERSION: Final = 0x11
SELECT, WINDOW = 0x00, 0x10
ID, _VERSION_AT, _ARBITRATION, _ENTRIES = 0x00, 0x01, 0x02, 0x10
_ID_BITS: Final = 0x0F00_0000

_ACTIVE_LOW, _REMOTE_IRR, _LEVEL, _MASKED = 1 << 13, 1 << 14, 1 << 15, 1 << 16
_LOGICAL: Final = 1 << 11
_WRITABLE: Final = 0xFF00_0000_0001_AFFF


class IoApic:
    """Implements ``vmm.devices.MemoryDevice``. ``send`` gives a message to the local APIC: whether it was accepted."""

    def __init__(self, send: Callable[[Message], bool]) -> None:
        self._send = send
        self._entries = [_MASKED] * PINS
        self._lines = [False] * PINS
        self._selected = 0
        self._id = 0

    def line(self, pin: int) -> Callable[[bool], None]:
        """What drives a pin, 0 to 23."""

        def drive(high: bool) -> None:  # noqa: FBT001 - a line is high or low
            was, self._lines[pin] = self._lines[pin], high
            entry = self._entries[pin]
            if entry & _LEVEL:
                self._follow_level(pin)
            elif high != was and high != bool(entry & _ACTIVE_LOW) and not entry & _MASKED:
                self._send(_message(entry))

        return drive

    def end_of_interrupt(self, vector: int) -> None:
        """The EOI broadcast: a level-triggered interrupt of that vector was handled."""
        for pin, entry in enumerate(self._entries):
            if entry & _LEVEL and entry & 0xFF == vector:
                self._entries[pin] &= ~_REMOTE_IRR
                self._follow_level(pin)

    def _follow_level(self, pin: int) -> None:
        entry = self._entries[pin]
        active = self._lines[pin] != bool(entry & _ACTIVE_LOW)
        if active and entry & (_LEVEL | _REMOTE_IRR | _MASKED) == _LEVEL and self._send(_message(entry)):
            self._entries[pin] |= _REMOTE_IRR

    # Registers

    def read(self, offset: int, size: int) -> int:
        """A load."""
        if offset & ~3 == SELECT:
            value = self._selected
        else:
            value = self._read_register(self._selected) if offset & ~3 == WINDOW else 0
        return value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A store; IOREGSEL takes any size, IOWIN 32 bits."""
        if offset == SELECT:
            self._selected = value & 0xFF
        elif offset == WINDOW and size == 4:
            self._write_register(self._selected, value)

    def _read_register(self, number: int) -> int:
        pin, high = divmod(number - _ENTRIES, 2)
        if 0 <= pin < PINS:
            return self._entries[pin] >> 32 * high & 0xFFFF_FFFF
        return {ID: self._id, _VERSION_AT: PINS - 1 << 16 | _VERSION, _ARBITRATION: self._id}.get(number, 0)

    def _write_register(self, number: int, value: int) -> None:
        pin, high = divmod(number - _ENTRIES, 2)
        if number == ID:
            self._id = value & _ID_BITS
        elif 0 <= pin < PINS:
            self._write_entry(pin, value << 32 * high, 0xFFFF_FFFF << 32 * high)

    def _write_entry(self, pin: int, value: int, half: int) -> None:
        """Write half of an entry. One that becomes edge-triggered has no remote IRR."""
        written = half & _WRITABLE
        entry = self._entries[pin] & ~written | value & written
        self._entries[pin] = entry if entry & _LEVEL else entry & ~_REMOTE_IRR
        self._follow_level(pin)


def _message(entry: int) -> Message:
    return Message(
        entry & 0xFF, entry >> 8 & 7, entry >> 56, logical=bool(entry & _LOGICAL), level=bool(entry & _LEVEL)
    )
