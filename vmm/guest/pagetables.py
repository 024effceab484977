"""The page tables that the VMM builds for a guest: 4-level for long mode, PAE for protected mode.

All pages are 4 KiB. Entries, SDM vol. 3, tables 4-8 to 4-11 (PAE) and 4-15 to 4-20 (4-level)::

    63      51:12         6     5     2      1      0
    NX      frame         D     A     U/S    R/W    P       leaf: NX, R/W and U/S as mapped; A and D set
    0       table         -     1     1      1      1       above: everything allowed, the leaf decides
    0       directory     -     0     0      0      1       PDPTE of PAE: these bits are reserved

A and D are set from the start, so that the tables are constants: the processor never writes to them.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from attrs import frozen

if TYPE_CHECKING:
    from vmm.guest.manifest import Mapping

PRESENT: Final = 1 << 0
WRITABLE: Final = 1 << 1
USER: Final = 1 << 2
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
NO_EXECUTE: Final = 1 << 63

_PAGE: Final = 4096
_ENTRIES: Final = 512
_TABLE: Final = struct.Struct("<512Q")


@frozen(slots=True)
class Layout:
    """A paging mode: the linear-address bit where each level's index starts, from the root to the leaf."""

    shifts: tuple[int, ...]
    root_flags: int


FOUR_LEVEL: Final = Layout((39, 30, 21, 12), PRESENT | WRITABLE | USER | ACCESSED)
PAE: Final = Layout((30, 21, 12), PRESENT)
_TABLE_FLAGS: Final = PRESENT | WRITABLE | USER | ACCESSED


class PageTables:
    """Page tables under construction; the root is at guest-physical ``base``, the others follow it."""

    def __init__(self, base: int, layout: Layout) -> None:
        self.base = base
        self._layout = layout
        self._tables: list[list[int]] = [[0] * _ENTRIES]
        # (level, linear address bits above that level's index) -> index of the table
        self._index: dict[tuple[int, int], int] = {(0, 0): 0}

    def map(self, mapping: Mapping) -> None:
        """Map all pages of ``mapping``, over what was there."""
        flags = PRESENT | ACCESSED | DIRTY
        flags |= WRITABLE if "w" in mapping.access else 0
        flags |= USER if mapping.user else 0
        flags |= 0 if "x" in mapping.access else NO_EXECUTE
        linear, gpa, left = mapping.gva, mapping.gpa, mapping.length // _PAGE
        while left:
            leaf = self._leaf(linear)
            first = linear // _PAGE % _ENTRIES
            count = min(left, _ENTRIES - first)
            size = count * _PAGE
            leaf[first : first + count] = range(gpa | flags, gpa + size | flags, _PAGE)
            linear, gpa, left = linear + size, gpa + size, left - count

    def to_bytes(self) -> bytes:
        """All tables, as they lie in memory from ``base`` on."""
        return b"".join(_TABLE.pack(*table) for table in self._tables)

    def _leaf(self, linear: int) -> list[int]:
        table = self._tables[0]
        for level, shift in enumerate(self._layout.shifts[:-1]):
            table = self._below(level, table, linear >> shift)
        return table

    def _below(self, level: int, table: list[int], prefix: int) -> list[int]:
        number = self._index.get((level + 1, prefix))
        if number is None:
            number = self._index[level + 1, prefix] = len(self._tables)
            self._tables.append([0] * _ENTRIES)
            flags = _TABLE_FLAGS if level else self._layout.root_flags
            table[prefix % _ENTRIES] = self.base + number * _PAGE | flags
        return self._tables[number]
