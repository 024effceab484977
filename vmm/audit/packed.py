"""Relocation tables as they lie in the file: REL, RELA, and the compact RELR.

A table is decoded anew each time that it is gone through, and never kept decoded: a RELR table of 8 bytes an entry
stands for up to 63 relocations each.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from attrs import frozen

from vmm.audit.model import Relocation
from vmm.guest.elf_file import ByteOrder

#: A part of the file, copied or not.
Bytes = bytes | memoryview


@frozen(slots=True)
class Layout:
    """How a machine writes words and relocations: ``bits`` is 32 or 64, ``order`` "little" or "big"."""

    bits: int
    order: ByteOrder
    machine: str

    @property
    def word(self) -> int:
        """Bytes of an address."""
        return self.bits // 8

    def words(self, data: Bytes) -> Iterator[tuple[int, ...]]:
        """``data`` as words of an address's size, one at a time; a rest is left out."""
        return self.structure(1).iter_unpack(data[: len(data) - len(data) % self.word])

    def structure(self, words: int) -> struct.Struct:
        """The layout of ``words`` addresses in a row."""
        return struct.Struct(("<" if self.order == "little" else ">") + ("I" if self.bits == 32 else "Q") * words)

    def split_info(self, info: int) -> tuple[int, int]:
        """The symbol and the type in an r_info."""
        if self.bits == 32:
            return info >> 8, info & 0xFF
        if self.machine == "EM_MIPS" and self.order == "little":
            # Not one number but fields in a row: r_sym in the first four bytes, r_type in the last.
            return info & 0xFFFF_FFFF, info >> 56
        return info >> 32, info & 0xFFFF_FFFF


@frozen(slots=True)
class RelTable:
    """REL (``words`` = 2: r_offset, r_info) or RELA (3: and r_addend)."""

    data: Bytes
    words: int
    layout: Layout

    def __len__(self) -> int:
        return len(self.data) // (self.words * self.layout.word)

    def __iter__(self) -> Iterator[Relocation]:
        structure, split_info = self.layout.structure(self.words), self.layout.split_info
        for entry in structure.iter_unpack(self.data[: len(self) * structure.size]):
            symbol, kind = split_info(entry[1])
            yield Relocation(entry[0], kind, symbol)


@frozen(slots=True)
class RelrTable:
    """RELR: an even word is the address of a relocation; an odd one a bitmap of the words after the last one.

    All of them are relative: RELR names no type and no symbol.
    """

    data: Bytes
    layout: Layout

    def __len__(self) -> int:
        return sum(word.bit_count() - 1 if word & 1 else 1 for (word,) in self.layout.words(self.data))

    def __iter__(self) -> Iterator[Relocation]:
        step, bits = self.layout.word, self.layout.bits
        following = 0
        for (word,) in self.layout.words(self.data):
            if word & 1:
                yield from _in_bitmap(word >> 1, following, step)
                following += (bits - 1) * step
            else:
                yield Relocation(word, None, 0)
                following = word + step
            following &= (1 << bits) - 1


def _in_bitmap(bitmap: int, start: int, step: int) -> Iterator[Relocation]:
    while bitmap:
        if bitmap & 1:
            yield Relocation(start, None, 0)
        bitmap >>= 1
        start += step
