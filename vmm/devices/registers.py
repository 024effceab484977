"""Byte-wide device registers on the port bus: an access of 2 or 4 bytes is one access a byte, in ascending order."""

from __future__ import annotations

from typing import Final, Protocol


class Registers(Protocol):
    """A device as the ISA bus sees it: registers of one byte, counted from its first port."""

    def read_register(self, offset: int) -> int:
        """The byte that IN gets."""

    def write_register(self, offset: int, value: int) -> None:
        """OUT of a byte."""


class ByteWide:
    """A ``vmm.devices.Device`` for ``count`` registers from port ``first`` on.

    Bytes of an access beyond the last register read as ones and are not written.
    """

    exact = False

    def __init__(self, registers: Registers, first: int, count: int) -> None:
        self._registers: Final = registers
        self._first: Final = first
        self._end: Final = first + count

    def read(self, port: int, size: int) -> int:
        """IN."""
        value = 0
        for index in range(size):
            inside = port + index < self._end
            byte = self._registers.read_register(port + index - self._first) if inside else 0xFF
            value |= byte << 8 * index
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        for index in range(min(size, self._end - port)):
            self._registers.write_register(port + index - self._first, value >> 8 * index & 0xFF)
