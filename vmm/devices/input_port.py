"""The input port: what the guest is given to read, byte by byte."""

from __future__ import annotations

from typing import Final

#: The most that a run can be given to read, in bytes.
INPUT_LIMIT: Final = 16 << 20


class InputPort:
    """Two ports, ``first`` and the next one. Writes are ignored.

    IN from the first takes the next 1, 2 or 4 bytes of ``data``, little-endian, with 0xff for each one after the end.
    IN from the second says how many bytes are left, or the most that fits into its size.
    """

    PORTS = 2
    exact = False

    def __init__(self, data: bytes, first: int) -> None:
        self._data = data
        self._first = first
        self._taken = 0

    def read(self, port: int, size: int) -> int:
        """Take bytes, or count them."""
        left = len(self._data) - self._taken
        if port != self._first:
            return min(left, (1 << 8 * size) - 1)
        piece = self._data[self._taken : self._taken + size]
        self._taken += len(piece)
        return int.from_bytes(piece.ljust(size, b"\xff"), "little")

    def write(self, _port: int, _size: int, _value: int) -> None:
        """Nothing to write."""
