"""A workpiece with flaws, a cutter that moves over it, and a sensor that looks ahead and interrupts.

For guests that steer something. ::

    port + 0   OUT, 32 bits   the cutter moves: bits 31:16 its position x, bits 15:0 its depth y
    port + 0   IN, 32 bits    the flaw that the sensor has found last, in the same form; all ones before the first
    port + 4   IN, 32 bits    how many flaws the cutter has hit

The sensor finds a flaw when the cutter comes within ``lead`` positions of it, and interrupts. A flaw is hit by a move
to exactly its position and depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

PORTS: Final = 8
_NONE: Final = 0xFFFF_FFFF
_HITS: Final = 4


class Workpiece:
    """``flaws`` are (x, y), each 0 to 65535; ``port`` is the first one; ``found`` is called at each flaw found."""

    exact = True

    def __init__(self, port: int, flaws: Sequence[tuple[int, int]], lead: int, found: Callable[[], None]) -> None:
        self._port = port
        self._ahead = list(flaws)
        self._flaws = frozenset(flaws)
        self._lead = lead
        self._found = found
        self._last = _NONE
        #: Flaws that the cutter has hit.
        self.hits = 0

    def read(self, port: int, _size: int) -> int:
        """The flaw found last, or the number of hits."""
        return self.hits if port - self._port == _HITS else self._last

    def write(self, port: int, _size: int, value: int) -> None:
        """Move the cutter."""
        if port != self._port:
            return
        x, y = value >> 16 & 0xFFFF, value & 0xFFFF
        self.hits += (x, y) in self._flaws
        for flaw in [flaw for flaw in self._ahead if flaw[0] - self._lead <= x]:
            self._ahead.remove(flaw)
            self._last = flaw[0] << 16 | flaw[1]
            self._found()
