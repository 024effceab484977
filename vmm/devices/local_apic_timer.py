"""The timer of a local APIC (SDM vol. 3, 11.5.4): a count-down at the bus clock, divided, one-shot or periodic.

The timer is not counted: where it stands follows from the virtual time of its start. The bus clock ticks once a
nanosecond, as the core crystal clock that CPUID leaf 0x15 names does. There is no TSC-deadline mode, as CPUID says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmm.devices.virtual_time import Clock, Timers

#: Ticks of the bus clock a second.
FREQUENCY: Final = 1_000_000_000
#: By bits 3, 1 and 0 of the divide configuration register.
_DIVISORS: Final = (2, 4, 8, 16, 32, 64, 128, 1)
_DIVIDE_BITS: Final = 0xB


class LocalApicTimer:
    """``expired`` is called each time the count gets to 0 while the interrupt is not masked."""

    def __init__(self, clock: Clock, timers: Timers, expired: Callable[[], None]) -> None:
        self._clock = clock
        self._timers = timers
        self._expired = expired
        self._alarm: Final = timers.make(self._expire)
        #: The initial-count register, 32 bits.
        self.initial = 0
        self._divide = 0
        self._periodic = False
        self._masked = True
        #: Virtual time of the start of the count; None while it is stopped.
        self._start: int | None = None

    @property
    def _divisor(self) -> int:
        return _DIVISORS[self._divide >> 1 & 4 | self._divide & 3]

    @property
    def _elapsed(self) -> int:
        """Counts since the start."""
        return 0 if self._start is None else (self._clock() - self._start) // self._divisor

    def catch_up(self) -> None:
        """Interrupt now if that is due; to be called before a register is written, after which it might not be."""
        self._timers.catch_up(self._alarm, self._clock())

    def start(self, initial: int) -> None:
        """Write the initial-count register: counting starts anew; 0 stops it."""
        self.initial = initial
        self._start = self._clock() if initial else None
        self._schedule()

    @property
    def current(self) -> int:
        """The current-count register."""
        if self._start is None:
            return 0
        elapsed = self._elapsed
        return self.initial - elapsed % self.initial if self._periodic else max(self.initial - elapsed, 0)

    @property
    def divide(self) -> int:
        """The divide configuration register."""
        return self._divide

    @divide.setter
    def divide(self, value: int) -> None:
        elapsed = self._elapsed
        self._divide = value & _DIVIDE_BITS
        if self._start is not None:
            self._start = self._clock() - elapsed * self._divisor
        self._schedule()

    def set_mode(self, *, periodic: bool, masked: bool) -> None:
        """What the LVT entry says. A count that goes on goes on; a one-shot that is over is over."""
        if not self.current:
            self._start = None
        self._periodic, self._masked = periodic, masked
        self._schedule()

    def _schedule(self) -> None:
        """Set the alarm to the next time that the count gets to 0, if anybody is to be told."""
        when = None
        if self._start is not None and not self._masked:
            counts = self.initial
            if self._periodic:
                counts *= self._elapsed // self.initial + 1
            when = self._start + counts * self._divisor
            if when <= self._clock():
                when = None
        self._timers.set(self._alarm, when)

    def _expire(self) -> None:
        self._expired()
        self._schedule()
