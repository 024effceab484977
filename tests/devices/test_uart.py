"""The 16550A: characters both ways, interrupts by priority, FIFOs, loopback, modem lines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm.devices import SerialPort
from vmm.devices.uart import BACKLOG

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)
FCR = IIR
OUT2 = 8


class Port:
    def __init__(self, *, ier: int = 0, fifo: int = 0) -> None:
        self.sent = bytearray()
        self.line = False
        self.rises = 0
        self.uart = SerialPort(self.sent.extend, self._drive)
        self.out(MCR, OUT2)
        self.out(FCR, fifo)
        self.out(IER, ier)

    def _drive(self, high: bool) -> None:
        self.rises += high and not self.line
        self.line = high

    def out(self, register: int, value: int) -> None:
        self.uart.write_register(register, value)

    def read(self, register: int) -> int:
        return self.uart.read_register(register)


def test_what_is_written_is_sent():
    port = Port()
    for byte in b"hello":
        assert port.read(LSR) & 0x60 == 0x60
        port.out(DATA, byte)
    assert port.sent == b"hello"


def test_what_is_received_is_read_in_order():
    port = Port(fifo=1)
    port.uart.receive(b"abc" * 20)
    got = bytearray()
    while port.read(LSR) & 1:
        got.append(port.read(DATA))
    assert got == b"abc" * 20


def test_the_divisor_is_behind_dlab():
    port = Port()
    port.out(LCR, 0x83)
    port.out(DATA, 0x0C)
    port.out(IER, 0x01)
    assert (port.read(DATA), port.read(IER)) == (0x0C, 0x01)
    port.out(LCR, 0x03)
    assert port.read(IER) == 0
    assert port.sent == b""


def test_received_data_interrupts_until_it_is_read():
    port = Port(ier=1)
    assert not port.line
    port.uart.receive(b"x")
    assert port.line
    assert port.read(IIR) == 0x04
    port.read(DATA)
    assert not port.line
    assert port.read(IIR) == 0x01


def test_below_the_trigger_level_it_is_a_timeout():
    port = Port(ier=1, fifo=0x81)
    port.uart.receive(b"1234567")
    assert port.read(IIR) == 0xCC
    port.uart.receive(b"8")
    assert port.read(IIR) == 0xC4


def test_an_empty_transmitter_interrupts_when_enabled_and_after_each_character():
    port = Port(ier=2)
    assert port.line
    assert port.read(IIR) == 0x02
    assert not port.line
    port.out(DATA, 0x41)
    assert port.line


def test_received_data_comes_before_the_empty_transmitter():
    port = Port(ier=3)
    port.uart.receive(b"x")
    assert port.read(IIR) == 0x04
    port.read(DATA)
    assert port.read(IIR) == 0x02


def test_out2_connects_the_interrupt():
    port = Port(ier=2)
    port.out(MCR, 0)
    assert not port.line
    port.out(MCR, OUT2)
    assert port.line


def test_without_fifo_there_is_room_for_one_and_nothing_is_lost():
    port = Port()
    port.uart.receive(b"ab")
    assert (port.read(DATA), port.read(DATA), port.read(LSR) & 1) == (0x61, 0x62, 0)


def test_each_character_is_an_edge_of_its_own_without_fifo():
    port = Port(ier=1)
    port.uart.receive(b"abc")
    for _ in range(3):
        port.read(DATA)
    assert port.rises == 3


def test_clearing_the_fifo_drops_what_is_in_it():
    port = Port(fifo=1)
    port.uart.receive(b"x" * 17)
    port.out(FCR, 3)
    assert port.read(LSR) & 1
    assert port.read(DATA) == 0x78
    assert not port.read(LSR) & 1


def test_loopback_returns_characters_and_modem_lines():
    port = Port()
    port.out(MCR, 0x10 | 0x0F)
    assert port.read(MSR) & 0xF0 == 0xF0
    port.out(DATA, 0x5A)
    assert port.read(DATA) == 0x5A
    assert port.sent == b""
    port.out(MCR, 0x1A)
    assert port.read(MSR) & 0xF0 == 0x90


def test_changes_of_modem_lines_are_reported_once():
    port = Port(ier=8)
    port.out(MCR, 0x10 | OUT2)
    port.out(MCR, OUT2)
    assert port.line
    assert port.read(IIR) == 0x00
    assert port.read(MSR) & 0x0F == 0x03
    assert not port.line
    assert port.read(MSR) == 0xB0


def test_the_scratch_register_keeps_what_it_is_told():
    port = Port()
    port.out(SCRATCH, 0xA5)
    assert port.read(SCRATCH) == 0xA5


def test_the_other_side_is_refused_more_than_its_backlog():
    port = Port()
    assert port.uart.receive(b"x" * (BACKLOG + 100)) == BACKLOG


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 255), st.binary(max_size=20)), max_size=50))
def test_the_line_says_what_iir_says(deeds):
    port = Port()
    for register, value, said in deeds:
        port.out(register, value)
        port.uart.receive(said)
        port.read(value & 7)
        connected, pending = bool(port.read(MCR) & OUT2), port.uart._pending != 1
        assert port.line is (connected and pending)
