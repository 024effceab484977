"""The MC146818: dates in all formats, setting them, flags and interrupts."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices import RealTimeClock
from vmm.devices.rtc import EPOCH
from vmm.devices.virtual_time import NANOSECONDS, SteppedClock

A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
DATE = (0x32, 9, 8, 7, 4, 2, 0)


class Rtc:
    def __init__(self) -> None:
        self.clock = SteppedClock()
        self.line = False
        self.interrupts: list[int] = []
        self.rtc = RealTimeClock(self.clock, self.clock.timers, self._drive)

    def _drive(self, high: bool) -> None:
        if high and not self.line:
            self.interrupts.append(self.clock.now)
        self.line = high

    def read(self, index: int) -> int:
        self.rtc.write_register(0, index)
        return self.rtc.read_register(1)

    def write(self, index: int, value: int) -> None:
        self.rtc.write_register(0, index)
        self.rtc.write_register(1, value)

    def set(self, *values: int) -> None:
        self.write(B, self.read(B) | 0x80)
        for index, value in zip(DATE, values, strict=True):
            self.write(index, value)
        self.write(B, self.read(B) & 0x7F)


def test_starts_at_the_epoch_in_bcd():
    rtc = Rtc()
    assert [rtc.read(index) for index in DATE] == [0x20, 0x26, 1, 1, 0, 0, 0]
    assert rtc.read(6) == EPOCH.isoweekday() % 7 + 1
    assert rtc.read(D) == 0x80


def test_goes_with_virtual_time():
    rtc = Rtc()
    rtc.clock.advance((31 * 86400 + 3 * 3600 + 25 * 60 + 59) * NANOSECONDS)
    assert [rtc.read(index) for index in DATE] == [0x20, 0x26, 2, 1, 3, 0x25, 0x59]


@pytest.mark.parametrize(
    ("format_", "hour", "byte"),
    [(2, 0, 0x00), (2, 23, 0x23), (6, 23, 23), (0, 0, 0x12), (0, 12, 0x92), (0, 23, 0x91), (4, 13, 0x81)],
)
def test_hours_in_each_format(format_, hour, byte):
    rtc = Rtc()
    rtc.write(B, format_)
    rtc.clock.advance(hour * 3600 * NANOSECONDS)
    assert rtc.read(4) == byte


def test_stands_still_while_set():
    rtc = Rtc()
    rtc.write(B, 0x82)
    rtc.clock.advance(10 * NANOSECONDS)
    assert rtc.read(0) == 0
    rtc.write(B, 0x02)
    rtc.clock.advance(2 * NANOSECONDS)
    assert rtc.read(0) == 2


def test_can_be_set():
    rtc = Rtc()
    rtc.set(0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58)
    assert rtc.rtc.now == datetime(1999, 12, 31, 23, 59, 58, tzinfo=UTC)
    rtc.clock.advance(2 * NANOSECONDS)
    assert [rtc.read(index) for index in DATE] == [0x20, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("date", [(0x20, 0x26, 0x02, 0x30, 0, 0, 0), (0xFF,) * 7, (0x99, 0x99, 1, 1, 0, 0, 0)])
def test_dates_that_there_are_not_are_not_taken(date):
    rtc = Rtc()
    rtc.set(*date)
    assert rtc.rtc.now == EPOCH


def test_an_update_is_announced():
    rtc = Rtc()
    rtc.clock.advance(NANOSECONDS - 300_000)
    assert not rtc.read(A) & 0x80
    rtc.clock.advance(100_000)
    assert rtc.read(A) & 0x80
    rtc.clock.advance(200_000)
    assert not rtc.read(A) & 0x80


def test_the_update_flag_is_cleared_by_reading():
    rtc = Rtc()
    rtc.clock.advance(NANOSECONDS)
    assert rtc.read(C) == 0x10
    assert rtc.read(C) == 0


def test_interrupts_at_each_update():
    rtc = Rtc()
    rtc.clock.advance(NANOSECONDS // 2)
    rtc.write(B, 0x12)
    for second in (1, 2):
        rtc.clock.advance(NANOSECONDS)
        assert rtc.interrupts[-1] == second * NANOSECONDS
        assert rtc.read(C) == 0x90
        assert not rtc.line
    rtc.write(B, 0x02)
    rtc.clock.advance(5 * NANOSECONDS)
    assert len(rtc.interrupts) == 2


def test_interrupts_at_the_alarm():
    rtc = Rtc()
    for index, value in ((1, 0x05), (3, 0xFF), (5, 0xC0)):
        rtc.write(index, value)
    rtc.write(B, 0x22)
    rtc.clock.advance(70 * NANOSECONDS)
    assert rtc.interrupts == [5 * NANOSECONDS]
    assert rtc.read(C) & 0xA0 == 0xA0


def test_interrupts_periodically():
    rtc = Rtc()
    rtc.write(A, 0x26)
    rtc.write(B, 0x42)
    rtc.clock.advance(NANOSECONDS // 100)
    assert len(rtc.interrupts) == 1
    for _ in range(9):
        assert rtc.read(C) & 0xC0 == 0xC0
        rtc.clock.advance(NANOSECONDS // 1024 + 1)
    assert len(rtc.interrupts) == 10


def test_ram_keeps_what_it_is_told():
    rtc = Rtc()
    rtc.write(0x40, 0x5A)
    assert rtc.read(0x40) == 0x5A
    rtc.write(D, 0)
    assert rtc.read(D) == 0x80


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=40))
def test_no_sequence_of_accesses_upsets_it(writes):
    rtc = Rtc()
    for index, value in writes:
        rtc.write(index, value)
        rtc.clock.advance(value * 10**7)
        assert all(0 <= rtc.read(where) <= 0xFF for where in range(128))
