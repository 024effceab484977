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
from vmm.audit.packed import Bytes, Layout

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

    data: Bytes
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
class _Head:
    """A group's head: ``size`` relocations; ``delta`` and ``info`` where they all have the same."""

    size: int
    delta: int | None
    info: int | None
    own_addends: bool

    @classmethod
    def read(cls, cursor: _Cursor, left: int) -> _Head:
        size = cursor.next()
        if not 0 < size <= left:
            raise PackedError(f"has a group of {size} relocations where {left} are left")
        flags = _Group(cursor.next() & 0xF)
        delta = cursor.next() if flags & _Group.BY_OFFSET else None
        info = cursor.next() if flags & _Group.BY_INFO else None
        addends = flags & (_Group.HAS_ADDEND | _Group.BY_ADDEND)
        if addends == _Group.HAS_ADDEND | _Group.BY_ADDEND:
            cursor.next()
        return cls(size, delta, info, own_addends=addends == _Group.HAS_ADDEND)

    @property
    def numbers(self) -> int:
        """How many numbers each of its relocations has of its own."""
        return (self.delta is None) + (self.info is None) + self.own_addends


@frozen(slots=True)
class AndroidTable:
    """A packed table. A few bytes may stand for any number of relocations; ``check`` costs what the bytes do."""

    data: Bytes
    layout: Layout

    def __len__(self) -> int:
        return self._begin()[1]

    def __iter__(self) -> Iterator[Relocation]:
        cursor, left = self._begin()
        split_info, mask = self.layout.split_info, (1 << self.layout.bits) - 1
        offset = cursor.next()
        while left:
            head = _Head.read(cursor, left)
            left -= head.size
            for _ in range(head.size):
                offset = offset + (cursor.next() if head.delta is None else head.delta) & mask
                symbol, kind = split_info((cursor.next() if head.info is None else head.info) & mask)
                if head.own_addends:
                    cursor.next()
                yield Relocation(offset, kind, symbol)

    def check(self) -> None:
        """Raise PackedError if going through the table, or its ``len``, would."""
        cursor, left = self._begin()
        cursor.next()
        while left:
            head = _Head.read(cursor, left)
            left -= head.size
            for _ in range(head.size * head.numbers):
                cursor.next()

    def _begin(self) -> tuple[_Cursor, int]:
        if bytes(self.data[: len(_MAGIC)]) != _MAGIC:
            raise PackedError("does not begin with APS2")
        cursor = _Cursor(self.data, len(_MAGIC))
        count = cursor.next()
        if count < 0:
            raise PackedError(f"has {count} relocations")
        return cursor, count
