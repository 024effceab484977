"""The 8254 programmable interval timer: three counters that count down at 1.193182 MHz (Intel 8254 data sheet).

Ports 0x40 to 0x42 are the counters, 0x43 the control word. A counter is not counted: where it stands follows from the
virtual time at which it was started, so that it costs nothing while nobody looks. OUT of counter 0 is IRQ 0, OUT of
counter 2 shows in port 0x61, which also drives that counter's GATE; the gates of the other two are high for good.

====  ============================  =========================================================
mode  name                          OUT
====  ============================  =========================================================
0     interrupt on terminal count   low, high from terminal count on
1     hardware one-shot             the same, started by the rising edge of GATE
2     rate generator                low in the last cycle of each period
3     square wave                   high for the first half of each period
4     software strobe               low for the one cycle at terminal count
5     hardware strobe               the same, started by the rising edge of GATE
====  ============================  =========================================================

Deviation: a new count restarts a running counter in modes 2 and 3, too, where the chip completes the period first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define, field

from vmm.devices.virtual_time import NANOSECONDS, Clock, Timers

FIRST_PORT: Final = 0x40
#: Cycles a second.
FREQUENCY: Final = 1_193_182

_CONTROL: Final = 3
_READ_BACK: Final = 3
_LATCH: Final = 0
_LOW, _HIGH, _BOTH = 1, 2, 3
_PERIODIC: Final = (2, 3)
_BY_GATE: Final = (1, 5)


def cycles(nanoseconds: int) -> int:
    """How many cycles are complete at a time."""
    return nanoseconds * FREQUENCY // NANOSECONDS


def time_of(cycle: int) -> int:
    """The first nanosecond at which so many cycles are complete."""
    return -(-cycle * NANOSECONDS // FREQUENCY)


@define(slots=True, eq=False)
class Counter:
    """One counter, in cycles since the machine was switched on."""

    mode: int = 3
    bcd: bool = False
    access: int = _BOTH
    #: Cycles from the start to terminal count, 1 to 0x10000 (10000 in BCD).
    initial: int = 0x10000
    gate: bool = True
    #: The cycle of the start; None while it waits for a count or for GATE.
    start: int | None = None
    #: With GATE low: how many cycles it had counted by then.
    held: int | None = None
    _written_low: int | None = None
    _loaded: bool = False
    _latched: list[int] = field(factory=list)
    _reads_high: bool = False

    def control(self, value: int) -> None:
        """A control word for this counter: it stops until a count is written."""
        self.access, self.mode, self.bcd = value >> 4 & 3, value >> 1 & 7, bool(value & 1)
        if self.mode > 5:
            self.mode -= 4
        self.start = self.held = self._written_low = None
        self._loaded = self._reads_high = False
        self._latched.clear()

    def write(self, value: int, now: int) -> bool:
        """A byte of the count, at a cycle; whether the count is complete with it."""
        if self.access == _BOTH and self._written_low is None:
            self._written_low = value
            if self.mode == 0:
                self.start = None  # the first byte stops the count
            return False
        low = value if self.access == _LOW else 0 if self.access == _HIGH else self._written_low or 0
        high = 0 if self.access == _LOW else value
        self._written_low = None
        self._load(low | high << 8, now)
        return True

    def _load(self, count: int, now: int) -> None:
        self.initial = (_from_bcd(count) or 10_000) if self.bcd else (count or 0x10000)
        self._loaded = True
        if self.mode not in _BY_GATE:
            self.start, self.held = now, None if self.gate else 0

    def set_gate(self, high: bool, now: int) -> None:  # noqa: FBT001 - a line is high or low
        """Drive GATE at a cycle."""
        if high == self.gate:
            return
        self.gate = high
        if not self._loaded:
            return
        if self.mode in _BY_GATE:
            self.start = now if high else self.start
        elif self.mode in _PERIODIC:
            self.start, self.held = (now, None) if high else (None, None)
        elif self.start is not None:
            self.start, self.held = (now - (self.held or 0), None) if high else (self.start, now - self.start)

    def _elapsed(self, now: int) -> int | None:
        if self.start is None:
            return None
        return now - self.start if self.held is None else self.held

    def value(self, now: int) -> int:
        """The counting element, as 16 bits."""
        elapsed = self._elapsed(now)
        if elapsed is None:
            count = self.initial
        elif self.mode == 2:
            count = self.initial - elapsed % self.initial
        elif self.mode == 3:
            count = self.initial - 2 * elapsed % self.initial
            count &= ~1 if self.initial > 1 else -1
        else:
            count = self.initial - elapsed
        return _to_bcd(count % 10_000) if self.bcd else count & 0xFFFF

    def out(self, now: int) -> bool:
        """OUT."""
        elapsed = self._elapsed(now)
        if elapsed is None:
            return self.mode != 0
        if self.mode in (0, 1):
            return elapsed >= self.initial
        if self.mode == 2:
            return elapsed % self.initial != self.initial - 1
        if self.mode == 3:
            return elapsed % self.initial < (self.initial + 1) // 2
        return elapsed != self.initial

    def next_rise(self, now: int) -> int | None:
        """The first cycle after ``now`` at which OUT goes high; None if there is none to come."""
        if self.start is None or self.held is not None:
            return None
        if self.mode in _PERIODIC:
            return self.start + ((now - self.start) // self.initial + 1) * self.initial
        end = self.start + self.initial + (self.mode in (4, 5))
        return end if end > now else None

    # What the processor reads

    def latch(self, now: int) -> None:
        """Keep the count until it is read."""
        if not self._latched:
            self._latched = self._bytes_of(self.value(now))

    def latch_status(self, now: int) -> None:
        """Keep the status byte, to be read before the count."""
        waiting = self.start is None or not self._loaded
        status = self.out(now) << 7 | waiting << 6 | self.access << 4 | self.mode << 1 | self.bcd
        self._latched.insert(0, status)

    def read(self, now: int) -> int:
        """The next byte: of what is latched, else of the count as it stands."""
        if self._latched:
            return self._latched.pop(0)
        low, high = self.value(now) & 0xFF, self.value(now) >> 8
        if self.access != _BOTH:
            return low if self.access == _LOW else high
        self._reads_high = not self._reads_high
        return low if self._reads_high else high

    def _bytes_of(self, value: int) -> list[int]:
        low, high = value & 0xFF, value >> 8
        return [low, high] if self.access == _BOTH else [low] if self.access == _LOW else [high]


class IntervalTimer:
    """The three counters. ``out0`` drives IRQ 0."""

    def __init__(self, clock: Clock, timers: Timers, out0: Callable[[bool], None]) -> None:
        self.counters: Final = (Counter(), Counter(), Counter(gate=False))
        self._clock = clock
        self._timers = timers
        self._out0 = out0
        self._alarm: Final = timers.make(self._rise)
        out0(True)  # noqa: FBT003 - as before the first control word

    @property
    def _now(self) -> int:
        return cycles(self._clock())

    def read_register(self, offset: int) -> int:
        """IN; the control word cannot be read."""
        return 0 if offset == _CONTROL else self.counters[offset].read(self._now)

    def write_register(self, offset: int, value: int) -> None:
        """OUT."""
        self._timers.catch_up(self._alarm, self._clock())
        now = self._now
        if offset == _CONTROL:
            self._control(value, now)
        elif not self.counters[offset].write(value, now):
            return
        if offset in (0, _CONTROL):
            self._follow_out0()

    def set_gate2(self, high: bool) -> None:  # noqa: FBT001 - a line is high or low
        """Drive GATE of counter 2."""
        self.counters[2].set_gate(high, self._now)

    @property
    def out2(self) -> bool:
        """OUT of counter 2."""
        return self.counters[2].out(self._now)

    def _control(self, value: int, now: int) -> None:
        selected = value >> 6
        if selected == _READ_BACK:
            self._read_back(value, now)
        elif value >> 4 & 3 == _LATCH:
            self.counters[selected].latch(now)
        else:
            self.counters[selected].control(value)

    def _read_back(self, value: int, now: int) -> None:
        for number, counter in enumerate(self.counters):
            if value >> 1 + number & 1:
                if not value & 0x20:
                    counter.latch(now)
                if not value & 0x10:
                    counter.latch_status(now)

    def _follow_out0(self) -> None:
        counter, now = self.counters[0], self._now
        self._out0(counter.out(now))
        rise = counter.next_rise(now)
        self._timers.set(self._alarm, None if rise is None else time_of(rise))

    def _rise(self) -> None:
        self._out0(False)  # noqa: FBT003 - it was low in the cycle before
        self._out0(True)  # noqa: FBT003
        rise = self.counters[0].next_rise(self._now)
        self._timers.set(self._alarm, None if rise is None else time_of(rise))


def _from_bcd(value: int) -> int:
    return sum((value >> 4 * digit & 0xF) * 10**digit for digit in range(4))


def _to_bcd(value: int) -> int:
    return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))
