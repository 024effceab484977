"""The I/O APIC by its data sheet: registers, edges, levels and remote IRR, masks, messages to the local APIC."""

from __future__ import annotations

import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices import IoApic, LocalApic
from vmm.devices.io_apic import PINS
from vmm.devices.local_apic import Message
from vmm.devices.virtual_time import SteppedClock

IOREGSEL, IOWIN = 0x00, 0x10
LOGICAL, ACTIVE_LOW, REMOTE_IRR, LEVEL, MASKED = 1 << 11, 1 << 13, 1 << 14, 1 << 15, 1 << 16


@define
class Board:
    """An I/O APIC, and whatever takes its messages."""

    sent: list[Message] = field(factory=list)
    accepts: bool = True
    io: IoApic = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.io = IoApic(self._receive)

    def _receive(self, message: Message) -> bool:
        self.sent.append(message)
        return self.accepts

    def __getitem__(self, register: int) -> int:
        self.io.write(IOREGSEL, 4, register)
        return self.io.read(IOWIN, 4)

    def __setitem__(self, register: int, value: int) -> None:
        self.io.write(IOREGSEL, 4, register)
        self.io.write(IOWIN, 4, value)

    def redirect(self, pin: int, low: int, destination: int = 0) -> None:
        self[0x11 + 2 * pin] = destination << 24
        self[0x10 + 2 * pin] = low

    def entry(self, pin: int) -> int:
        return self[0x10 + 2 * pin] | self[0x11 + 2 * pin] << 32

    @property
    def vectors(self) -> list[int]:
        return [message.vector for message in self.sent]


def test_it_has_24_pins_and_an_id_that_can_be_written():
    board = Board()
    assert board[1] == 23 << 16 | 0x11
    board[0] = 0xFFFF_FFFF
    assert board[0] == board[2] == 0x0F00_0000


def test_after_a_reset_every_pin_is_masked():
    board = Board()
    assert [board.entry(pin) for pin in range(PINS)] == [MASKED] * PINS


def test_an_entry_keeps_the_bits_that_can_be_written():
    board = Board()
    board[0x10], board[0x11] = 0xFFFF_FFFF, 0xFFFF_FFFF
    assert board.entry(0) == 0xFF00_0000_0001_AFFF


@pytest.mark.parametrize("register", [3, 0x0F, 0x40, 0xFF])
def test_what_is_no_register_reads_as_0(register):
    board = Board()
    board[register] = 0xFFFF_FFFF
    assert board[register] == 0


def test_the_index_is_a_byte_and_the_window_takes_only_32_bits():
    board = Board()
    board.io.write(IOREGSEL, 4, 0xABCD_EF01)
    assert board.io.read(IOREGSEL, 4) == 1
    board.io.write(IOREGSEL, 1, 0x10)
    board.io.write(IOWIN, 2, 0x40)
    assert board.io.read(IOWIN, 4) == MASKED
    assert board.io.read(IOWIN + 2, 1) == 1
    assert board.io.read(0x20, 4) == 0


@pytest.mark.parametrize("pin", [0, 2, 4, 23])
def test_an_edge_is_one_message(pin):
    board = Board()
    board.redirect(pin, 0x30 + pin)
    drive = board.io.line(pin)
    for high in (True, True, False, False):
        drive(high)
    assert board.sent == [Message(0x30 + pin, 0, 0)]


def test_a_message_has_what_the_entry_says():
    board = Board()
    board.redirect(4, 0x40 | 1 << 8 | LOGICAL, 0x05)
    board.io.line(4)(True)
    assert board.sent == [Message(0x40, 1, 5, logical=True)]


def test_an_active_low_edge_is_a_fall():
    board = Board()
    board.redirect(4, 0x40 | ACTIVE_LOW)
    drive = board.io.line(4)
    drive(True)
    assert board.sent == []
    drive(False)
    assert board.vectors == [0x40]


def test_an_edge_at_a_masked_pin_is_lost():
    board = Board()
    board.redirect(4, 0x40 | MASKED)
    board.io.line(4)(True)
    board.redirect(4, 0x40)
    assert board.sent == []


def test_a_level_at_a_masked_pin_is_sent_when_it_is_unmasked():
    board = Board()
    board.redirect(9, 0x40 | LEVEL | MASKED)
    board.io.line(9)(True)
    assert board.sent == []
    board.redirect(9, 0x40 | LEVEL)
    assert board.sent == [Message(0x40, 0, 0, level=True)]


def test_a_level_is_sent_again_after_the_end_of_the_interrupt_only():
    board = Board()
    board.redirect(9, 0x40 | LEVEL)
    drive = board.io.line(9)
    for high in (True, False, True):
        drive(high)
    assert board.vectors == [0x40]
    assert board.entry(9) & REMOTE_IRR
    board.io.end_of_interrupt(0x41)
    assert board.vectors == [0x40]
    board.io.end_of_interrupt(0x40)
    assert board.vectors == [0x40, 0x40]
    drive(False)
    board.io.end_of_interrupt(0x40)
    assert board.vectors == [0x40, 0x40]
    assert not board.entry(9) & REMOTE_IRR


def test_an_active_low_level_is_there_while_the_line_is_low():
    board = Board()
    board.redirect(9, 0x40 | LEVEL | ACTIVE_LOW)
    assert board.vectors == [0x40]
    board.io.line(9)(True)
    board.io.end_of_interrupt(0x40)
    assert board.vectors == [0x40]


def test_a_level_that_nobody_accepts_is_not_waited_for():
    board = Board(accepts=False)
    board.redirect(9, 0x40 | LEVEL)
    drive = board.io.line(9)
    drive(True)
    assert not board.entry(9) & REMOTE_IRR
    board.accepts = True
    drive(True)
    assert board.vectors == [0x40, 0x40]
    assert board.entry(9) & REMOTE_IRR


def test_an_entry_that_becomes_edge_triggered_has_no_remote_irr():
    board = Board()
    board.redirect(9, 0x40 | LEVEL)
    board.io.line(9)(True)
    board.redirect(9, 0x40 | MASKED)
    assert not board.entry(9) & REMOTE_IRR
    board.redirect(9, 0x40 | LEVEL)
    assert board.vectors == [0x40, 0x40]


def test_an_interrupt_ends_for_every_pin_of_its_vector():
    board = Board()
    for pin in (9, 10):
        board.redirect(pin, 0x40 | LEVEL)
        board.io.line(pin)(True)
    board.io.end_of_interrupt(0x40)
    assert board.vectors == [0x40] * 4


@define
class Line:
    """A level-triggered line whose device wants so much service."""

    wants: int = 0


@given(st.lists(st.sampled_from(["want", "serve", "mask", "unmask"]), max_size=40))
def test_a_level_triggered_device_is_served_as_long_as_it_wants_and_never_twice_at_once(steps):
    """Together with a local APIC: no request is lost, none is left over, whatever the order."""
    clock = SteppedClock()
    ended = []
    local = LocalApic(
        clock, clock.timers, None, raised=lambda: None, ended=ended.append, nmi=lambda: None
    )
    io = IoApic(local.receive)
    local.write(0xF0, 4, 0x1FF)
    device, drive, masked = Line(), io.line(9), False

    def redirect(low: int) -> None:
        io.write(IOREGSEL, 4, 0x10 + 18)
        io.write(IOWIN, 4, low)

    redirect(0x40 | LEVEL)
    for step in steps:
        if step == "want":
            device.wants += 1
            drive(True)
        elif step == "serve" and local.asserted:
            assert local.acknowledge() == 0x40
            assert not local.asserted
            device.wants = max(device.wants - 1, 0)
            drive(device.wants > 0)
            local.write(0xB0, 4, 0)
            io.end_of_interrupt(ended.pop())
        elif step in ("mask", "unmask"):
            masked = step == "mask"
            redirect(0x40 | LEVEL | (MASKED if masked else 0))
        if device.wants and not masked:
            assert local.asserted
    redirect(0x40 | LEVEL)
    while local.asserted:
        local.acknowledge()
        device.wants = max(device.wants - 1, 0)
        drive(device.wants > 0)
        local.write(0xB0, 4, 0)
        io.end_of_interrupt(ended.pop())
    assert device.wants == 0
