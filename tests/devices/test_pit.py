"""The 8254: its modes against the data sheet's diagrams, latches, gates, and the interrupts of counter 0."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices import IntervalTimer, SystemControlPort
from vmm.devices.pit import FREQUENCY, cycles, time_of
from vmm.devices.virtual_time import NANOSECONDS, SteppedClock


class Timer:
    def __init__(self) -> None:
        self.clock = SteppedClock()
        self.rises: list[int] = []
        self.level = True
        self.pit = IntervalTimer(self.clock, self.clock.timers, self._out0)
        self.port_61 = SystemControlPort(self.clock, self.pit)

    def _out0(self, high: bool) -> None:
        if high and not self.level:
            self.rises.append(cycles(self.clock.now))
        self.level = high

    def program(self, counter: int, mode: int, count: int, *, bcd: bool = False) -> None:
        self.pit.write_register(3, counter << 6 | 3 << 4 | mode << 1 | bcd)
        self.pit.write_register(counter, count & 0xFF)
        self.pit.write_register(counter, count >> 8)

    def go_to(self, cycle: int) -> None:
        self.clock.advance(time_of(cycle) - self.clock.now)

    def read(self, counter: int) -> int:
        self.pit.write_register(3, counter << 6)
        return self.pit.read_register(counter) | self.pit.read_register(counter) << 8


def test_cycles_and_times_fit_together():
    assert cycles(NANOSECONDS) == FREQUENCY
    for cycle in (0, 1, 7, 12345, FREQUENCY, 10**12):
        assert cycles(time_of(cycle)) == cycle
        assert cycle == 0 or cycles(time_of(cycle) - 1) == cycle - 1


def test_mode_0_interrupts_once_at_terminal_count():
    timer = Timer()
    timer.program(0, 0, 1000)
    timer.go_to(999)
    assert timer.rises == []
    assert timer.read(0) == 1
    timer.go_to(5000)
    assert timer.rises == [1000]


def test_mode_0_goes_on_counting_below_zero():
    timer = Timer()
    timer.program(0, 0, 1000)
    timer.go_to(1002)
    assert timer.read(0) == 0xFFFE


def test_mode_2_interrupts_each_period():
    timer = Timer()
    timer.program(0, 2, 500)
    timer.go_to(1999)
    assert timer.rises[-3:] == [500, 1000, 1500]
    assert timer.read(0) == 1
    timer.go_to(2000)
    assert timer.read(0) == 500


def test_mode_3_counts_by_two_and_interrupts_each_period():
    timer = Timer()
    timer.program(0, 3, 1000)
    timer.go_to(100)
    assert timer.read(0) == 800
    timer.go_to(3000)
    assert timer.rises[-3:] == [1000, 2000, 3000]


def test_mode_4_strobes_once():
    timer = Timer()
    timer.program(0, 4, 100)
    timer.go_to(1000)
    assert timer.rises[-1] == 101


def test_a_new_control_word_stops_the_interrupts():
    timer = Timer()
    timer.program(0, 2, 500)
    timer.pit.write_register(3, 0x30)
    timer.go_to(5000)
    assert [rise for rise in timer.rises if rise > 0] == []


@pytest.mark.parametrize("count", [0, 1, 2, 0xFFFF])
def test_zero_is_the_largest_count(count):
    timer = Timer()
    timer.program(0, 0, count)
    timer.go_to(0x10000)
    assert timer.rises == [count or 0x10000]


def test_bcd_counts_in_decimal():
    timer = Timer()
    timer.program(0, 0, 0x1000, bcd=True)
    timer.go_to(1)
    assert timer.read(0) == 0x999
    timer.go_to(1000)
    assert timer.rises == [1000]


def test_a_latched_count_stays_until_it_is_read():
    timer = Timer()
    timer.program(0, 0, 0x1234)
    timer.pit.write_register(3, 0)
    timer.go_to(0x100)
    timer.pit.write_register(3, 0)
    assert timer.pit.read_register(0) == 0x34
    assert timer.pit.read_register(0) == 0x12
    assert timer.read(0) == 0x1134


def test_unlatched_reads_give_low_and_high_byte_in_turn():
    timer = Timer()
    timer.program(0, 0, 0x1234)
    assert [timer.pit.read_register(0) for _ in range(3)] == [0x34, 0x12, 0x34]


def test_read_back_gives_status_before_the_count():
    timer = Timer()
    timer.program(0, 2, 0x1234)
    timer.pit.write_register(3, 0xC2)
    assert timer.pit.read_register(0) == 0xB4
    assert timer.pit.read_register(0) == 0x34
    timer.pit.write_register(3, 0x30)
    timer.pit.write_register(3, 0xE2)
    assert timer.pit.read_register(0) == 0x70


def test_port_61_gates_counter_2_and_shows_its_output():
    timer = Timer()
    timer.program(2, 0, 100)
    timer.go_to(1000)
    assert timer.port_61.read_register(0) & 0x20 == 0
    timer.port_61.write_register(0, 1)
    timer.go_to(1099)
    assert timer.port_61.read_register(0) & 0x20 == 0
    timer.go_to(1100)
    assert timer.port_61.read_register(0) & 0x21 == 0x21


def test_a_low_gate_holds_the_count():
    timer = Timer()
    timer.port_61.write_register(0, 1)
    timer.program(2, 0, 100)
    timer.go_to(40)
    timer.port_61.write_register(0, 0)
    timer.go_to(500)
    assert timer.read(2) == 60
    timer.port_61.write_register(0, 1)
    timer.go_to(510)
    assert timer.read(2) == 50


def test_the_gate_starts_a_one_shot_anew():
    timer = Timer()
    timer.program(2, 1, 100)
    assert timer.pit.out2
    for start in (10, 60):
        timer.go_to(start)
        timer.port_61.write_register(0, 0)
        timer.port_61.write_register(0, 1)
        assert not timer.pit.out2
    timer.go_to(159)
    assert not timer.pit.out2
    timer.go_to(160)
    assert timer.pit.out2


def test_the_refresh_bit_toggles():
    timer = Timer()
    seen = set()
    for _ in range(4):
        seen.add(timer.port_61.read_register(0) & 0x10)
        timer.clock.advance(15_085)
    assert seen == {0, 0x10}


@given(st.integers(2, 5000), st.integers(1, 20), st.sampled_from([2, 3]))
def test_periodic_interrupts_come_at_multiples_however_time_is_cut(period, parts, mode):
    timer = Timer()
    timer.program(0, mode, period)
    end = 4 * period + 1
    for part in range(1, parts + 1):
        timer.go_to(end * part // parts)
    assert [rise for rise in timer.rises if rise] == [period, 2 * period, 3 * period, 4 * period]


@given(st.integers(0, 3), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 255)), max_size=40))
def test_no_sequence_of_accesses_upsets_it(offset, writes):
    timer = Timer()
    for where, value in writes:
        timer.pit.write_register(where, value)
        timer.clock.advance(value * 1000)
        assert 0 <= timer.pit.read_register(offset) <= 0xFF
        timer.port_61.write_register(0, value)


def test_an_interrupt_that_is_due_is_not_lost_to_a_control_word():
    """Time passes between two looks at the alarms, and a latch command may come in between."""
    timer = Timer()
    timer.program(0, 2, 1000)
    timer.clock.now = time_of(1003)
    timer.read(0)
    assert timer.rises == [1003]
    timer.go_to(2000)
    assert timer.rises == [1003, 2000]
