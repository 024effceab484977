"""Android's packed relocations (DT_ANDROID_REL, DT_ANDROID_RELA): groups of differences in signed LEB128.

::

    "APS2"  count  first r_offset
    group:  size  flags  [r_offset delta, if by offset]  [r_info, if by info]  [r_addend delta, if by addend]
            size times:  [r_offset delta]                [r_info]              [r_addend delta]

What stands in a group's head is left out of its entries. The format is that of bionic's loader.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final

from attrs import define, frozen

from vmm.audit.model import Relocation
from vmm.audit.packed import Layout

_MAGIC: Final = b"APS2"
#: Bytes of the longest LEB128 number of 64 bits.
_LONGEST: Final = 10


class PackedError(ValueError):
    """A packed table that breaks off or contradicts itself."""


class _Group(enum.IntFlag):
    BY_INFO = 1
    BY_OFFSET = 2
    BY_ADDEND = 4
    HAS_ADDEND = 8


@define(slots=True)
class _Cursor:
    """Numbers one after the other; raises PackedError at the end of ``data``."""

    data: bytes
    place: int = 0

    def next(self) -> int:
        value = 0
        for index in range(_LONGEST):
            if self.place >= len(self.data):
                raise PackedError("breaks off")
            byte = self.data[self.place]
            self.place += 1
            value |= (byte & 0x7F) << 7 * index
            if not byte & 0x80:
                return value - (1 << 7 * (index + 1)) if byte & 0x40 else value
        raise PackedError("holds a number of more than 64 bits")


@frozen(slots=True)
class AndroidTable:
    """A packed table. Going through it raises PackedError where it is damaged, as ``len`` does."""

    data: bytes
    layout: Layout

    def __len__(self) -> int:
        return self._begin()[1]

    def __iter__(self) -> Iterator[Relocation]:
        cursor, left = self._begin()
        offset = cursor.next()
        while left:
            size = cursor.next()
            if not 0 < size <= left:
                raise PackedError(f"has a group of {size} relocations where {left} are left")
            left -= size
            for delta, info in self._group(cursor, size):
                offset = offset + delta & (1 << self.layout.bits) - 1
                symbol, kind = self.layout.split_info(info & (1 << self.layout.bits) - 1)
                yield Relocation(offset, kind, symbol)

    def _begin(self) -> tuple[_Cursor, int]:
        if not self.data.startswith(_MAGIC):
            raise PackedError("does not begin with APS2")
        cursor = _Cursor(self.data, len(_MAGIC))
        return cursor, max(cursor.next(), 0)

    def _group(self, cursor: _Cursor, size: int) -> Iterator[tuple[int, int]]:
        """The difference of r_offset, and r_info, of each relocation of a group whose size has been read."""
        flags = _Group(cursor.next() & 0xF)
        delta = cursor.next() if flags & _Group.BY_OFFSET else None
        info = cursor.next() if flags & _Group.BY_INFO else None
        addends = flags & (_Group.HAS_ADDEND | _Group.BY_ADDEND)
        if addends == _Group.HAS_ADDEND | _Group.BY_ADDEND:
            cursor.next()
        for _ in range(size):
            yield cursor.next() if delta is None else delta, cursor.next() if info is None else info
            if addends == _Group.HAS_ADDEND:
                cursor.next()
