"""What is cached of an EPT: leaves of GPA pages, as a processor caches guest-physical mappings.

It is memory with an address, so that what is cached can be compared where Python would be too slow.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Pages of guest-physical memory whose leaves lie in the array: the first 16 GiB. It takes memory where it is used.
_PAGES: Final = 1 << 22
#: Pages of 2 MiB.
_IN_REGION: Final = 512


class LeafCache:
    """Leaves by GPA page number. 0 stands for a leaf that is not cached, so that one that is 0 never is."""

    def __init__(self) -> None:
        self._memory: Final = mmap.mmap(-1, 8 * _PAGES)
        #: Those of the first pages; what lies beyond is in ``high``.
        self.low: Final = memoryview(self._memory).cast("Q")
        self.high: Final[dict[int, int]] = {}
        self._address: Final = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._first, self._end = _PAGES, 0

    def get(self, page: int) -> int:
        """What is cached of a page, or 0."""
        return self.low[page] if page < _PAGES else self.high.get(page, 0)

    def put(self, page: int, leaf: int) -> None:
        """Cache a leaf."""
        if page < _PAGES:
            self.low[page] = leaf
            self._first, self._end = min(self._first, page), max(self._end, page + 1)
        elif leaf:
            self.high[page] = leaf
        else:
            self.high.pop(page, None)

    def put_region(self, first: int, leaf: int) -> None:
        """Cache the leaves of 512 pages from a multiple of 512 on, that lie one after the other from ``leaf`` on."""
        leaves = array("Q", range(leaf, leaf + (_IN_REGION << 12), 1 << 12))
        if first < _PAGES:
            self.low[first : first + _IN_REGION] = leaves
            self._first, self._end = min(self._first, first), max(self._end, first + _IN_REGION)
        else:
            self.high.update(enumerate(leaves, first))

    def address_of(self, page: int) -> int:
        """The address, in the VMM's own memory, of what is cached of a page; 0 for one beyond the array."""
        return self._address + 8 * page if page < _PAGES else 0

    def forget(self, first: int, count: int) -> None:
        """Forget what is cached of so many pages."""
        start, end = max(first, self._first), min(first + count, self._end)
        if start < end:
            self._memory[8 * start : 8 * end] = bytes(8 * (end - start))
        if self.high:
            for page in [page for page in self.high if first <= page < first + count]:
                del self.high[page]

    def __iter__(self) -> Iterator[int]:
        """The pages of which something is cached, ascending."""
        yield from (page for page in range(self._first, self._end) if self.low[page])
        yield from sorted(self.high)
