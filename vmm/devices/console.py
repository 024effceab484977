"""The debug console: bytes written to one port are the guest's printed output."""

from __future__ import annotations

from collections.abc import Callable


class ConsolePort:
    """Collects the guest's output (at most ``LIMIT`` bytes of it) and hands each piece on."""

    LIMIT = 1 << 20
    exact = False

    def __init__(self, listener: Callable[[bytes], None]) -> None:
        self._listener = listener
        self.output = bytearray()

    def read(self, _port: int, _size: int) -> int:
        """Reads give 0xe9 in every byte, which is how guests detect the port."""
        return 0xE9E9E9E9

    def write(self, _port: int, size: int, value: int) -> None:
        """Print."""
        self.emit(value.to_bytes(size, "little"))

    def emit(self, data: bytes) -> None:
        """Print."""
        if len(self.output) < self.LIMIT:
            self.output += data
        self._listener(data)
