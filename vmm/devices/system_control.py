"""Port 0x61: the gate of the timer's counter 2, its output, and the memory refresh that toggles all the time.

===  ==============================================
bit  meaning
===  ==============================================
0    GATE of counter 2 (read and write)
1    speaker on (read and write)
4    toggles with each refresh, every 15.085 us
5    OUT of counter 2
===  ==============================================
"""

from __future__ import annotations

from typing import Final

from vmm.devices.pit import IntervalTimer
from vmm.devices.virtual_time import Clock

PORT: Final = 0x61
_GATE: Final = 1 << 0
_WRITABLE: Final = 0x0F
_REFRESH: Final = 1 << 4
_OUT: Final = 1 << 5
_REFRESH_PERIOD: Final = 15_085


class SystemControlPort:
    """The port, of which ``timer`` has counter 2."""

    def __init__(self, clock: Clock, timer: IntervalTimer) -> None:
        self._clock = clock
        self._timer = timer
        self._written = 0

    def read_register(self, _offset: int) -> int:
        """IN."""
        refresh = _REFRESH if self._clock() // _REFRESH_PERIOD & 1 else 0
        return self._written | refresh | (_OUT if self._timer.out2 else 0)

    def write_register(self, _offset: int, value: int) -> None:
        """OUT."""
        self._written = value & _WRITABLE
        self._timer.set_gate2(bool(value & _GATE))
