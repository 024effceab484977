"""Interprocessor interrupts by a port: what a local APIC's interrupt command register does, in 16 bits.

======  =====================================================================
bits    of a word written with OUT
======  =====================================================================
7:0     vector, 32 to 255; anything lower is ignored
15:8    number of the vCPU that is interrupted; 255: all but the one that asks
======  =====================================================================

IN reads the number of the vCPU that asks. The interrupt is taken at the target's next instruction boundary at which
its flags allow it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

FIRST_VECTOR: Final = 32
_ALL_OTHERS: Final = 0xFF


class InterprocessorPort:
    """``current`` tells which of ``count`` vCPUs asks; ``interrupt`` is called with (vector, vCPU)."""

    exact = True

    def __init__(self, count: int, current: Callable[[], int], interrupt: Callable[[int, int], None]) -> None:
        self._count = count
        self._current = current
        self._interrupt = interrupt

    def read(self, _port: int, _size: int) -> int:
        """The number of the vCPU that asks."""
        return self._current()

    def write(self, _port: int, _size: int, value: int) -> None:
        """Interrupt one vCPU, or all others."""
        vector, target = value & 0xFF, value >> 8 & 0xFF
        if vector < FIRST_VECTOR:
            return
        asking = self._current()
        for number in range(self._count):
            if number == target or (target == _ALL_OTHERS and number != asking):
                self._interrupt(vector, number)
