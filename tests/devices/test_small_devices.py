"""The rest of a PC's ports: byte-wide registers, keyboard controller, PCI; and the timers that devices share."""

from __future__ import annotations

import sys

import pytest

from vmm.devices import ByteWide, KeyboardController, PciConfiguration, PortBus
from vmm.devices.virtual_time import SteppedClock, Timers
from vmm.inputs import Inputs


class Memory:
    def __init__(self, size: int) -> None:
        self.registers = list(range(size))

    def read_register(self, offset: int) -> int:
        return self.registers[offset]

    def write_register(self, offset: int, value: int) -> None:
        self.registers[offset] = value


class TestByteWide:
    def test_a_wide_access_is_one_access_a_byte(self):
        memory, bus = Memory(8), PortBus(Inputs())
        bus.attach(ByteWide(memory, 0x3F8, 8), 0x3F8, 8, inside=True)
        assert bus.read(0x3FA, 2) == 0x0302
        bus.write(0x3F9, 4, 0x44332211)
        assert memory.registers == [0, 0x11, 0x22, 0x33, 0x44, 5, 6, 7]

    def test_beyond_the_last_register_there_is_nothing(self):
        memory, bus = Memory(2), PortBus(Inputs())
        bus.attach(ByteWide(memory, 0x20, 2), 0x20, 2, inside=True)
        assert bus.read(0x21, 4) == 0xFFFFFF01
        bus.write(0x21, 2, 0xAABB)
        assert memory.registers == [0, 0xBB]


class TestKeyboardController:
    def test_resets_when_bit_0_is_pulsed(self):
        resets = []
        controller = KeyboardController(lambda: resets.append(1))
        for command in (0xFF, 0xF1, 0xAA, 0xFE):
            assert not resets
            controller.write(0x64, 1, command)
        assert resets == [1]

    def test_passes_its_self_test_and_has_nothing_connected(self):
        controller = KeyboardController(lambda: None)
        for command, answer in ((0xAA, 0x55), (0xAB, 1), (0xA9, 1)):
            controller.write(0x64, 1, command)
            assert controller.read(0x64, 1) & 1
            assert controller.read(0x60, 1) == answer
            assert not controller.read(0x64, 1) & 1

    def test_keeps_its_command_byte(self):
        controller = KeyboardController(lambda: None)
        controller.write(0x64, 1, 0x60)
        controller.write(0x60, 1, 0x65)
        controller.write(0x60, 1, 0xED)
        controller.write(0x64, 1, 0x20)
        assert controller.read(0x60, 1) == 0x65

    def test_has_no_port_for_a_mouse(self):
        controller = KeyboardController(lambda: None)
        controller.write(0x64, 1, 0xD3)
        controller.write(0x60, 1, 0x5A)
        assert controller.read(0x60, 1) == 0


class TestPci:
    def test_the_address_reads_back_and_nobody_answers(self):
        pci = PciConfiguration(lambda: None)
        pci.write(0xCF8, 4, 0x80001234)
        assert pci.read(0xCF8, 4) == 0x80001234
        assert pci.read(0xCFC, 4) == 0xFFFFFFFF

    @pytest.mark.parametrize(("values", "resets"), [((2, 6), 1), ((6,), 1), ((6, 6), 1), ((6, 2, 6), 2), ((2,), 0)])
    def test_reset_control_resets_at_the_rising_edge_of_bit_2(self, values, resets):
        seen = []
        pci = PciConfiguration(lambda: seen.append(1))
        for value in values:
            pci.write(0xCF9, 1, value)
        assert len(seen) == resets


class TestTimers:
    def test_alarms_come_in_order_of_time_then_of_setting(self):
        clock, order = SteppedClock(), []
        alarms = {name: clock.timers.make(lambda name=name: order.append((name, clock.now))) for name in "abc"}
        for name, when in (("c", 30), ("b", 20), ("a", 20)):
            clock.timers.set(alarms[name], when)
        assert clock.timers.next == 20
        clock.advance(100)
        assert order == [("b", 20), ("a", 20), ("c", 30)]
        assert clock.timers.next is None

    def test_setting_again_or_unsetting_replaces_what_was_set(self):
        timers, calls = Timers(), []
        first, second = timers.make(lambda: calls.append(1)), timers.make(lambda: calls.append(2))
        timers.set(first, 10)
        timers.set(first, 50)
        timers.set(second, 20)
        timers.set(second, None)
        timers.advance(49)
        assert calls == []
        timers.advance(50)
        assert calls == [1]

    def test_an_alarm_may_set_itself_again(self):
        clock, calls = SteppedClock(), []

        def tick() -> None:
            calls.append(clock.now)
            clock.timers.set(alarm, clock.now + 10)

        alarm = clock.timers.make(tick)
        clock.timers.set(alarm, 10)
        clock.advance(35)
        assert calls == [10, 20, 30]

    def test_what_is_set_again_and_again_takes_no_room_and_keeps_its_place(self):
        timers, calls = Timers(), []
        alarms = [timers.make(lambda number=number: calls.append(number)) for number in range(3)]
        timers.set(alarms[0], 1_000_100)
        timers.set(alarms[1], 1_000_100)
        for round_ in range(10_000):
            timers.set(alarms[2], 1_000_000 + round_ % 3)
        assert sys.getsizeof(timers._due) < 4096
        timers.advance(1_000_100)
        assert calls == [2, 0, 1]
