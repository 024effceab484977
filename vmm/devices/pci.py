"""PCI configuration space by mechanism #1, of a bus with nothing on it, and the reset control register.

==============  ====================================================================
port            meaning
==============  ====================================================================
0xCF8           CONFIG_ADDRESS, written and read as 4 bytes; bit 31 enables
0xCFC to 0xCFF  CONFIG_DATA: reads as ones, since no device answers
0xCF9           a byte with bit 2 set (and it was clear before) resets the processor
==============  ====================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

ADDRESS_PORT: Final = 0xCF8
PORTS: Final = 8
_RESET_PORT: Final = 0xCF9
_ADDRESS_BITS: Final = 0x80FF_FFFC
_RESET_BITS: Final = 0x0E
_RESET: Final = 1 << 2
_ONES: Final = 0xFFFF_FFFF


class PciConfiguration:
    """Implements ``vmm.devices.Device`` for all eight ports; ``reset`` is called when the guest resets."""

    exact = True

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._address = 0
        self._reset_control = 0

    def read(self, port: int, size: int) -> int:
        """IN."""
        if port == ADDRESS_PORT and size == 4:
            return self._address
        return self._reset_control if port == _RESET_PORT and size == 1 else _ONES

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        if port == ADDRESS_PORT and size == 4:
            self._address = value & _ADDRESS_BITS
        elif port == _RESET_PORT and size == 1:
            rises = value & _RESET and not self._reset_control & _RESET
            self._reset_control = value & _RESET_BITS
            if rises:
                self._reset()
