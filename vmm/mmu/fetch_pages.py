"""Where fetches of linear pages went: what translated blocks were translated from.

The engine says of a block only its linear address. Its bytes lie where the last fetch of its pages led, whatever the
page tables have come to say since. Each page has a cell of memory, so that fills which are answered without Python put
that on record, too.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

#: How many linear pages are remembered.
CAPACITY: Final = 1 << 16
#: In the cell of a page whose fetches are forgotten.
_FORGOTTEN: Final = (1 << 64) - 1


class FetchPages:
    """Host pages by linear page, at most ``CAPACITY`` of them."""

    def __init__(self) -> None:
        self._memory: Final = mmap.mmap(-1, 8 * CAPACITY)
        self._cells: Final = memoryview(self._memory).cast("Q")
        self._address: Final = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._places: Final[dict[int, int]] = {}

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another page; then ``reset`` makes some."""
        return len(self._places) >= CAPACITY

    def host(self, page: int) -> int | None:
        """The host page that the last fetch of a page went to; None if that is not known."""
        place = self._places.get(page)
        if place is None:
            return None
        host = self._cells[place]
        return None if host == _FORGOTTEN else host

    def record(self, page: int, host: int) -> int:
        """A fetch of a page goes to a host page; the address of the page's cell, good until ``reset``."""
        place = self._places.setdefault(page, len(self._places))
        self._cells[place] = host
        return self._address + 8 * place

    def forget(self, page: int) -> None:
        """It is not known any more where fetches of a page go."""
        place = self._places.get(page)
        if place is not None:
            self._cells[place] = _FORGOTTEN

    def forget_all(self) -> None:
        """Nor of any page."""
        used = 8 * len(self._places)
        self._memory[:used] = b"\xff" * used

    def reset(self) -> None:
        """Forget all, and give cells to other pages: nobody may write to one any more."""
        self._places.clear()
