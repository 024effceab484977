"""Ports 0x60 and 0x64: a keyboard controller (8042) without keyboard and mouse, which can reset the processor.

===========  ================================================================
written to   effect
===========  ================================================================
0x64         a command: 0xAA self-test (0x55 to 0x60), 0xAB test of the
             keyboard's port, 0xA9 of the mouse's (both 1: clock line stuck
             low), 0x20 and 0x60 read and write the command byte,
             0xD3 loops the next byte through the mouse's port (answered by 0),
             0xF0 to 0xFF pulse output lines: bit 0 clear resets the processor
0x60         the argument of command 0x60 or 0xD3; what else is for a
             keyboard gets no answer
===========  ================================================================

Status (IN from 0x64): bit 0 there is a byte at 0x60, bit 2 the self-test was passed, bit 3 the last byte written was a
command, bit 4 the keyboard is not locked. Deviation: a controller without a port for a mouse does not answer 0xD3, for
which drivers wait half a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

FIRST_PORT: Final = 0x60
#: From the data port to the command and status port.
COMMAND_OFFSET: Final = 4

_SELF_TEST, _SELF_TEST_PASSED = 0xAA, 0x55
_TEST_PORTS: Final = (0xA9, 0xAB)
_CLOCK_STUCK_LOW: Final = 1
_READ_COMMAND_BYTE, _WRITE_COMMAND_BYTE = 0x20, 0x60
_LOOP_MOUSE: Final = 0xD3
_PULSE: Final = 0xF0
_NO_RESET: Final = 1
_FULL, _SYSTEM, _COMMAND, _UNLOCKED = 1 << 0, 1 << 2, 1 << 3, 1 << 4


class KeyboardController:
    """Implements ``vmm.devices.Device`` for both ports; ``reset`` is called when the guest resets the processor."""

    exact = True

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._output: int | None = None
        self._status = _UNLOCKED
        self._command_byte = 0
        self._argument_of = 0

    def read(self, port: int, _size: int) -> int:
        """The status, or the byte that is there."""
        if port == FIRST_PORT + COMMAND_OFFSET:
            return self._status | (_FULL if self._output is not None else 0)
        output, self._output = self._output, None
        return output or 0

    def write(self, port: int, _size: int, value: int) -> None:
        """A command or its argument."""
        if port == FIRST_PORT + COMMAND_OFFSET:
            self._status |= _COMMAND
            self._command(value & 0xFF)
            return
        self._status &= ~_COMMAND
        if self._argument_of == _WRITE_COMMAND_BYTE:
            self._command_byte = value & 0xFF
        elif self._argument_of == _LOOP_MOUSE:
            self._output = 0
        self._argument_of = 0

    def _command(self, value: int) -> None:
        self._argument_of = value if value in (_WRITE_COMMAND_BYTE, _LOOP_MOUSE) else 0
        if value == _SELF_TEST:
            self._status |= _SYSTEM
            self._output = _SELF_TEST_PASSED
        elif value in _TEST_PORTS:
            self._output = _CLOCK_STUCK_LOW
        elif value == _READ_COMMAND_BYTE:
            self._output = self._command_byte
        elif value & _PULSE == _PULSE and not value & _NO_RESET:
            self._reset()
