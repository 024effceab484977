"""ACPI's fixed hardware: the timer, its event, and registers that can be read back."""

from __future__ import annotations

import pytest
from attrs import define, field

from vmm.devices import AcpiPowerManagement
from vmm.devices.acpi_pm import FIRST_PORT, FREQUENCY
from vmm.devices.virtual_time import NANOSECONDS, SteppedClock

STATUS, ENABLE, CONTROL, TIMER = (FIRST_PORT + offset for offset in (0, 2, 4, 8))
#: The first nanosecond at which the top bit of the timer has changed.
HALF = -(-(1 << 23) * NANOSECONDS // FREQUENCY)


@define
class Board:
    clock: SteppedClock = field(factory=SteppedClock)
    line: bool = False
    power: AcpiPowerManagement = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.power = AcpiPowerManagement(self.clock, self.clock.timers, self._drive)

    def _drive(self, high: bool) -> None:
        self.line = high

    def out(self, port: int, value: int, size: int = 2) -> None:
        self.power.write(port, size, value)

    def read(self, port: int, size: int = 2) -> int:
        return self.power.read(port, size)


def test_the_timer_counts_at_its_frequency_and_wraps_at_24_bits():
    board = Board()
    board.clock.advance(NANOSECONDS)
    assert board.read(TIMER, 4) == FREQUENCY
    board.clock.advance(9 * NANOSECONDS)
    assert board.read(TIMER, 4) == 10 * FREQUENCY % (1 << 24)


def test_acpi_is_on_from_the_start_and_cannot_be_turned_off():
    board = Board()
    assert board.read(CONTROL) == 1
    board.out(CONTROL, 0x3C00)
    assert board.read(CONTROL) == 0x1C01, "SLP_EN reads as 0"


def test_the_top_bit_makes_an_event_at_each_change_until_it_is_cleared():
    board = Board()
    board.clock.advance(HALF - 1)
    assert board.read(STATUS) == 0
    board.clock.advance(1)
    assert board.read(STATUS) == 1
    board.out(STATUS, 1)
    assert board.read(STATUS) == 0
    board.clock.advance(HALF)
    assert board.read(STATUS) == 1


def test_the_event_interrupts_while_it_is_enabled():
    board = Board()
    board.clock.advance(HALF)
    assert not board.line
    board.out(ENABLE, 1)
    assert board.line
    board.out(STATUS, 1)
    assert not board.line
    board.clock.advance(HALF)
    assert board.line
    board.out(ENABLE, 0)
    assert not board.line
    assert board.clock.timers.next is None


def test_two_registers_side_by_side_are_read_and_written_as_one():
    board = Board()
    board.out(STATUS, 0xFFFF_0000, size=4)
    assert board.read(ENABLE) == 0x0721
    assert board.read(STATUS, 4) == 0x0721_0000


@pytest.mark.parametrize(("port", "size"), [(ENABLE, 1), (ENABLE + 1, 2), (ENABLE + 1, 1)])
def test_half_a_register_is_not_written(port, size):
    board = Board()
    board.out(port, 0xFFFF, size)
    assert board.read(ENABLE) == 0


def test_what_lies_behind_the_timer_reads_as_0():
    assert Board().read(TIMER + 3, 4) == 0
