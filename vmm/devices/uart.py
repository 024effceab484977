"""A 16550A serial port (National Semiconductor PC16550D data sheet), with its interrupts and FIFOs.

======  ==========================================================  =====================
offset  IN                                                          OUT
======  ==========================================================  =====================
0       RBR, received character (DLAB: divisor, low byte)           THR, character to send
1       IER, interrupts enabled (DLAB: divisor, high byte)          the same
2       IIR, the interrupt that is pending                          FCR, FIFO control
3       LCR, line control; bit 7 is DLAB                            the same
4       MCR, modem control; OUT2 connects the interrupt             the same
5       LSR, line status                                            -
6       MSR, modem status                                           -
7       SCR, scratch                                                the same
======  ==========================================================  =====================

The line has no speed: a character is sent as soon as it is written, and the transmitter is always empty. The other
side keeps what it has to say until there is room, so that nothing is ever overrun; what is in the FIFO has been there
for long enough for a character timeout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

COM1: Final = 0x3F8
REGISTERS: Final = 8
#: Characters that the other side may have waiting before it is refused more.
BACKLOG: Final = 1 << 20

_FIFO: Final = 16
_TRIGGERS: Final = (1, 4, 8, 14)

_IER_RECEIVED, _IER_EMPTY, _IER_MODEM = 1 << 0, 1 << 1, 1 << 3
_IIR_NONE, _IIR_MODEM, _IIR_EMPTY, _IIR_RECEIVED, _IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x0C
_IIR_FIFOS: Final = 0xC0
_FCR_ENABLE, _FCR_CLEAR_RECEIVER = 1 << 0, 1 << 1
_LCR_DLAB: Final = 1 << 7
_MCR_DTR, _MCR_RTS, _MCR_OUT1, _MCR_OUT2, _MCR_LOOP = (1 << bit for bit in range(5))
_LSR_READY, _LSR_THR_EMPTY, _LSR_IDLE = 1 << 0, 1 << 5, 1 << 6
_MSR_CTS, _MSR_DSR, _MSR_RI, _MSR_DCD = (1 << bit for bit in range(4, 8))
_MSR_RI_FELL: Final = 1 << 2
#: What the other end of the cable says all the time.
_PEER: Final = _MSR_CTS | _MSR_DSR | _MSR_DCD


class SerialPort:
    """``send`` gets each character that the guest sends, ``interrupt`` drives the request line."""

    def __init__(self, send: Callable[[bytes], None], interrupt: Callable[[bool], None]) -> None:
        self._send = send
        self._interrupt = interrupt
        self._received: Final[deque[int]] = deque()
        self._waiting: Final[deque[int]] = deque()
        self._divisor = [1, 0]
        self._ier = self._fcr = self._lcr = self._mcr = self._scratch = 0
        self._msr = _PEER
        self._modem_changes = 0
        self._thr_interrupt = False

    def receive(self, data: bytes) -> int:
        """What the other side says; how many bytes of it are taken (see ``BACKLOG``)."""
        taken = data[: BACKLOG - len(self._waiting)]
        self._waiting.extend(taken)
        self._settle()
        return len(taken)

    def read_register(self, offset: int) -> int:
        """IN."""
        match offset:
            case 0 | 1 if self._lcr & _LCR_DLAB:
                return self._divisor[offset]
            case 0:
                return self._read_character()
            case 1:
                return self._ier
            case 2:
                return self._identify()
            case 5:
                return _LSR_THR_EMPTY | _LSR_IDLE | (_LSR_READY if self._received else 0)
            case 6:
                return self._read_modem_status()
            case _:
                return {3: self._lcr, 4: self._mcr, 7: self._scratch}[offset]

    def write_register(self, offset: int, value: int) -> None:
        """OUT."""
        match offset:
            case 0 | 1 if self._lcr & _LCR_DLAB:
                self._divisor[offset] = value
            case 0:
                self._transmit(value)
            case 1:
                self._enable(value & 0xF)
            case 2:
                self._control_fifos(value)
            case 3:
                self._lcr = value
            case 4:
                self._control_modem(value & 0x1F)
            case 7:
                self._scratch = value
        self._settle()

    # Characters

    def _read_character(self) -> int:
        character = self._received.popleft() if self._received else 0
        self._drive()  # the line falls before the next character comes: an interrupt is an edge
        self._settle()
        return character

    def _transmit(self, value: int) -> None:
        self._thr_interrupt = True
        if not self._mcr & _MCR_LOOP:
            self._send(bytes((value,)))
        elif len(self._received) < self._room:
            self._received.append(value)

    @property
    def _room(self) -> int:
        return _FIFO if self._fcr & _FCR_ENABLE else 1

    def _control_fifos(self, value: int) -> None:
        if value & _FCR_CLEAR_RECEIVER or (value ^ self._fcr) & _FCR_ENABLE:
            self._received.clear()
        self._fcr = value if value & _FCR_ENABLE else 0

    # Interrupts

    def _enable(self, value: int) -> None:
        if value & _IER_EMPTY and not self._ier & _IER_EMPTY:
            self._thr_interrupt = True
        self._ier = value

    @property
    def _pending(self) -> int:
        """The interrupt of the highest priority, as IIR names it."""
        if self._ier & _IER_RECEIVED and self._received:
            trigger = _TRIGGERS[self._fcr >> 6] if self._fcr & _FCR_ENABLE else 1
            return _IIR_RECEIVED if len(self._received) >= trigger else _IIR_TIMEOUT
        if self._ier & _IER_EMPTY and self._thr_interrupt:
            return _IIR_EMPTY
        if self._ier & _IER_MODEM and self._modem_changes:
            return _IIR_MODEM
        return _IIR_NONE

    def _identify(self) -> int:
        pending = self._pending
        if pending == _IIR_EMPTY:
            self._thr_interrupt = False
            self._settle()
        return pending | (_IIR_FIFOS if self._fcr & _FCR_ENABLE else 0)

    def _settle(self) -> None:
        """Let in what waits, and drive the request line."""
        while self._waiting and len(self._received) < self._room and not self._mcr & _MCR_LOOP:
            self._received.append(self._waiting.popleft())
        self._drive()

    def _drive(self) -> None:
        self._interrupt(bool(self._mcr & _MCR_OUT2) and self._pending != _IIR_NONE)

    # Modem lines

    def _control_modem(self, value: int) -> None:
        self._mcr = value
        lines = _PEER
        if value & _MCR_LOOP:
            lines = 0
            looped = ((_MCR_RTS, _MSR_CTS), (_MCR_DTR, _MSR_DSR), (_MCR_OUT1, _MSR_RI), (_MCR_OUT2, _MSR_DCD))
            for control, status in looped:
                lines |= status if value & control else 0
        changed = lines ^ self._msr
        ring_rises = changed & lines & _MSR_RI
        self._modem_changes |= changed >> 4 & ~(_MSR_RI_FELL if ring_rises else 0)
        self._msr = lines

    def _read_modem_status(self) -> int:
        status = self._msr | self._modem_changes
        self._modem_changes = 0
        self._settle()
        return status
