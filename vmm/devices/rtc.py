"""The MC146818 real-time clock with its CMOS RAM, and its interrupts on IRQ 8 (Motorola MC146818 data sheet).

Port 0x70 selects one of 128 bytes, port 0x71 is that byte.

=========  ==========================================================
byte       meaning
=========  ==========================================================
0, 2, 4    seconds, minutes, hours; 1, 3, 5 the same of the alarm
6 to 9     day of the week (1 is Sunday), day, month, year
0x0A       A: update in progress (7), periodic rate (3:0)
0x0B       B: SET (7), PIE AIE UIE (6:4), DM binary (2), 24 hours (1)
0x0C       C: IRQF (7), PF AF UF (6:4); cleared by reading
0x0D       D: the battery is good (7)
0x32       century, as PCs have it
=========  ==========================================================

The clock is a function of virtual time, so a run that repeats sees the same dates. Deviations: daylight saving (DSE)
and the square wave have no effect; AF follows the alarm only while the interrupt of alarm or update is enabled.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from vmm.devices.virtual_time import NANOSECONDS, Clock, Timers

FIRST_PORT: Final = 0x70
#: When the machine is switched on.
EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
_ALARMS: Final = (1, 3, 5)
_A, _B, _C, _D = 0x0A, 0x0B, 0x0C, 0x0D
_CLOCK: Final = (_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY)
_SET, _PERIODIC, _ALARM, _UPDATE, _BINARY, _HOURS_24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
_IN_PROGRESS: Final = 0x80
_PM: Final = 0x80
_ANY: Final = 0xC0
_FLAGS: Final = _PERIODIC | _ALARM | _UPDATE
#: How long before a second begins A says that an update is in progress.
_UPDATE_TIME: Final = 244_000
_CRYSTAL: Final = 32_768
#: Later dates are not taken, so that time never runs out.
_LAST_YEAR: Final = 8999


class RealTimeClock:
    """``interrupt`` drives IRQ 8."""

    def __init__(self, clock: Clock, timers: Timers, interrupt: Callable[[bool], None]) -> None:
        self._clock = clock
        self._timers = timers
        self._interrupt = interrupt
        self._index = 0
        self._ram: Final = bytearray(128)
        self._ram[_A], self._ram[_B], self._ram[_D] = 0x26, _HOURS_24, 0x80
        #: What the date is ahead of EPOCH + virtual time.
        self._ahead = timedelta()
        #: While SET stops the clock: the bytes that are to be its time.
        self._stopped: dict[int, int] | None = None
        #: The second in which C was read last.
        self._seen = 0
        self._second: Final = timers.make(self._next_second)
        self._period: Final = timers.make(self._next_period)

    def read_register(self, offset: int) -> int:
        """IN; the selection cannot be read."""
        if not offset:
            return 0xFF
        index = self._index
        if index in _CLOCK:
            return self._fields()[index] if self._stopped is None else self._stopped[index]
        if index == _A:
            return self._ram[_A] & ~_IN_PROGRESS | (_IN_PROGRESS if self._is_updating else 0)
        if index == _C:
            return self._read_flags()
        return self._ram[index]

    def write_register(self, offset: int, value: int) -> None:
        """OUT."""
        if not offset:
            self._index = value & 0x7F
        elif self._index in _CLOCK:
            self._set_field(self._index, value)
        elif self._index == _A:
            self._ram[_A] = value & ~_IN_PROGRESS
            self._restart_period()
        elif self._index == _B:
            self._write_b(value)
        elif self._index not in (_C, _D):
            self._ram[self._index] = value

    def _read_flags(self) -> int:
        second = self._clock() // NANOSECONDS
        updated = _UPDATE if second != self._seen else 0
        flags, self._ram[_C], self._seen = self._ram[_C] | updated, 0, second
        self._interrupt(False)  # noqa: FBT003 - the line goes low
        return flags

    # The date

    @property
    def now(self) -> datetime:
        """The date and time of day that the clock shows."""
        return EPOCH + timedelta(microseconds=self._clock() // 1000) + self._ahead

    @property
    def _is_updating(self) -> bool:
        return self._stopped is None and NANOSECONDS - self._clock() % NANOSECONDS <= _UPDATE_TIME

    def _fields(self) -> dict[int, int]:
        now = self.now
        values = {
            _SECONDS: now.second,
            _MINUTES: now.minute,
            _WEEKDAY: now.isoweekday() % 7 + 1,
            _DAY: now.day,
            _MONTH: now.month,
            _YEAR: now.year % 100,
            _CENTURY: now.year // 100,
        }
        encoded = {index: self._encode(value) for index, value in values.items()}
        return {**encoded, _HOURS: self._encode_hour(now.hour)}

    def _set_field(self, index: int, value: int) -> None:
        fields = self._fields() if self._stopped is None else self._stopped
        fields[index] = value
        if self._stopped is None:
            self._start_from(fields)

    def _start_from(self, fields: dict[int, int]) -> None:
        """Go on from the date that the bytes give; one that does not exist changes nothing."""
        try:
            wanted = datetime(
                self._decode(fields[_CENTURY]) * 100 + self._decode(fields[_YEAR]),
                self._decode(fields[_MONTH]),
                self._decode(fields[_DAY]),
                self._decode_hour(fields[_HOURS]),
                self._decode(fields[_MINUTES]),
                self._decode(fields[_SECONDS]),
                tzinfo=UTC,
            )
        except ValueError:
            return
        if wanted.year > _LAST_YEAR:
            return
        self._ahead += wanted - self.now.replace(microsecond=0)

    def _encode(self, value: int) -> int:
        return value if self._ram[_B] & _BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._ram[_B] & _BINARY else (value >> 4) * 10 + (value & 0xF)

    def _encode_hour(self, hour: int) -> int:
        if self._ram[_B] & _HOURS_24:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (_PM if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self._ram[_B] & _HOURS_24:
            return self._decode(value)
        return self._decode(value & ~_PM) % 12 + (12 if value & _PM else 0)

    # Interrupts

    def _write_b(self, value: int) -> None:
        before, self._ram[_B] = self._ram[_B], value
        if value & _SET and self._stopped is None:
            self._ram[_B] = before
            self._stopped = self._fields()
            self._ram[_B] = value & ~_UPDATE
        elif not value & _SET and self._stopped is not None:
            fields, self._stopped = self._stopped, None
            self._start_from(fields)
        if value & (_ALARM | _UPDATE) and self._second.when is None:
            self._timers.set(self._second, (self._clock() // NANOSECONDS + 1) * NANOSECONDS)
        self._restart_period()
        self._settle()

    def _next_second(self) -> None:
        if self._stopped is None:
            self._ram[_C] |= _UPDATE
            if self._alarm_matches():
                self._ram[_C] |= _ALARM
            self._settle()
        if self._ram[_B] & (_ALARM | _UPDATE):
            self._timers.set(self._second, (self._clock() // NANOSECONDS + 1) * NANOSECONDS)

    def _alarm_matches(self) -> bool:
        fields = self._fields()
        return all(
            self._ram[index] & _ANY == _ANY or self._ram[index] == fields[index - 1] for index in _ALARMS
        )

    @property
    def _period_time(self) -> int | None:
        """Nanoseconds from one periodic interrupt to the next; None without one."""
        rate = self._ram[_A] & 0xF
        if not rate or not self._ram[_B] & _PERIODIC:
            return None
        return (1 << (rate + 7 if rate <= 2 else rate) - 1) * NANOSECONDS // _CRYSTAL

    def _restart_period(self) -> None:
        period = self._period_time
        self._timers.set(self._period, None if period is None else self._clock() + period)

    def _next_period(self) -> None:
        self._ram[_C] |= _PERIODIC
        self._restart_period()
        self._settle()

    def _settle(self) -> None:
        """IRQF and the line: some flag is set whose interrupt is enabled."""
        active = bool(self._ram[_C] & self._ram[_B] & _FLAGS)
        self._ram[_C] = self._ram[_C] & _FLAGS | (_SET if active else 0)
        self._interrupt(active)
