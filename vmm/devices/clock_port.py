"""The clock port: the host's time, which no two nodes agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

NANOSECONDS: Final = 1_000_000_000
_WORD: Final = 0xFFFF_FFFF


class ClockPort:
    """Three ports that read as 32 bits each, or as the low bits of them.

    IN from the first takes a moment and gives its seconds since 1970-01-01 00:00 UTC, bits 31:0. The second gives bits
    63:32 of the seconds of that moment, the third its nanoseconds, 0 to 999,999,999; both are 0 before the first IN.
    Writes are ignored. ``now`` is the time in nanoseconds since 1970, not negative.
    """

    PORTS = 3
    exact = False

    def __init__(self, now: Callable[[], int], first: int) -> None:
        self._now = now
        self._first = first
        self._moment = 0

    def read(self, port: int, _size: int) -> int:
        """Take a moment, or give another part of it."""
        if port == self._first:
            self._moment = self._now()
        seconds, nanoseconds = divmod(self._moment, NANOSECONDS)
        return (seconds & _WORD, seconds >> 32 & _WORD, nanoseconds)[port - self._first]

    def write(self, _port: int, _size: int, _value: int) -> None:
        """Nothing to write."""
