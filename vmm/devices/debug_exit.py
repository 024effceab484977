"""The debug exit: a byte written to its port ends the run and is its result."""

from __future__ import annotations

from collections.abc import Callable


class DebugExit:
    """Calls back with (port, value) on a write; reads give zero."""

    exact = True

    def __init__(self, ended: Callable[[int, int], None]) -> None:
        self._ended = ended

    def read(self, _port: int, _size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, port: int, _size: int, value: int) -> None:
        """End the run."""
        self._ended(port, value & 0xFF)
