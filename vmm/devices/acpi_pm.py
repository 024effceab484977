"""The fixed hardware of ACPI: power-management events, their control, and the power-management timer (ACPI 6.5, 4.8).

======  =====  =========================================================================
offset  bytes  register
======  =====  =========================================================================
0       2      PM1 status: bit 0, the timer's top bit has changed; written with ones to clear
2       2      PM1 enable: bit 0, that raises the system control interrupt
4       2      PM1 control: bit 0, ACPI is on, always
8       4      the timer: 24 bits at 3.579545 MHz
======  =====  =========================================================================

The other fixed events (buttons, global lock, clock) have no hardware, and never come. Nor does sleep: a write of SLP_EN
does nothing, and ACPI's tables name no sleep state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmm.devices.virtual_time import NANOSECONDS, Clock, Timers

FIRST_PORT: Final = 0x600
PORTS: Final = 12
#: Of the system control interrupt.
IRQ: Final = 9
EVENTS, CONTROL, TIMER = 0, 4, 8
FREQUENCY: Final = 3_579_545

_STATUS, _ENABLE = 0, 2
_TIMER_EVENT: Final = 1 << 0
_EVENT_BITS: Final = 0x0721
_ACPI_ON: Final = 1 << 0
_CONTROL_BITS: Final = 0x1C06
_TIMER_BITS: Final = 24
#: Counts between two changes of the timer's top bit.
_HALF: Final = 1 << _TIMER_BITS - 1


class AcpiPowerManagement:
    """Implements ``vmm.devices.Device``. ``interrupt`` drives the line of the system control interrupt."""

    exact = False

    def __init__(self, clock: Clock, timers: Timers, interrupt: Callable[[bool], None]) -> None:
        self._clock = clock
        self._timers = timers
        self._interrupt = interrupt
        self._alarm: Final = timers.make(self._drive)
        self._enabled = self._control = 0
        #: How often the top bit had changed when its event was cleared last.
        self._changes_seen = 0

    @property
    def _count(self) -> int:
        return self._clock() * FREQUENCY // NANOSECONDS

    @property
    def _status(self) -> int:
        return _TIMER_EVENT if self._count // _HALF > self._changes_seen else 0

    def read(self, port: int, size: int) -> int:
        """IN; two registers side by side are read as one."""
        offset = port - FIRST_PORT
        registers = (
            self._status | self._enabled << 16 | (self._control | _ACPI_ON) << 32
            | (self._count & (1 << _TIMER_BITS) - 1) << 64
        )  # fmt: skip
        return registers >> 8 * offset & (1 << 8 * size) - 1

    def write(self, port: int, size: int, value: int) -> None:
        """OUT; two registers side by side are written as one, half a register is not written."""
        offset = port - FIRST_PORT
        if offset % 2 or size == 1:
            return
        for index in range(0, size, 2):
            self._write_register(offset + index, value >> 8 * index & 0xFFFF)
        self._drive()

    def _write_register(self, offset: int, value: int) -> None:
        if offset == _STATUS and value & _TIMER_EVENT:
            self._changes_seen = self._count // _HALF
        elif offset == _ENABLE:
            self._enabled = value & _EVENT_BITS
        elif offset == CONTROL:
            self._control = value & _CONTROL_BITS

    def _drive(self) -> None:
        """Drive the interrupt line, and have an alarm at the next change of the top bit if that is to be told."""
        self._interrupt(bool(self._status & self._enabled))
        when = None
        if self._enabled & _TIMER_EVENT and not self._status:
            when = -(-(self._changes_seen + 1) * _HALF * NANOSECONDS // FREQUENCY)
        self._timers.set(self._alarm, when)
