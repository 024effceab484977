"""The tables that a loader finds by the dynamic table: relocations, and the names of symbols.

A loader sees memory, not the file, and so does this: tables are found by their addresses, through the PT_LOAD
headers. That is also how the dynamic table itself is read (from p_vaddr up to DT_NULL): p_offset and p_filesz of
PT_DYNAMIC are for tools, and need not say the same.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final

from attrs import frozen

from vmm.audit.android import AndroidTable, PackedError
from vmm.audit.model import Dynamic, RelocationTable, Segment
from vmm.audit.packed import Layout, RelrTable, RelTable
from vmm.errors import ImageError
from vmm.guest.elf_file import ElfFile
from vmm.guest.symbols import NAME_LIMIT, clean_name

#: The most entries of a dynamic table, and the most relocations of one file.
DYNAMIC_LIMIT: Final = 1 << 14
RELOCATIONS_LIMIT: Final = 1 << 22
_DF_TEXTREL: Final = 4
#: Bytes of a symbol, by class; st_name are the first four.
_SYMBOL_SIZE: Final = {32: 16, 64: 24}
_DEBUG_ONLY: Final = "the file is damaged, or holds debug information only: give the one that is run"


class Tag(enum.IntEnum):
    """Types of entries in the dynamic table (d_tag), of those that matter here."""

    NULL = 0
    PLTRELSZ = 2
    STRTAB = 5
    SYMTAB = 6
    RELA = 7
    RELASZ = 8
    INIT = 12
    FINI = 13
    REL = 17
    RELSZ = 18
    PLTREL = 20
    TEXTREL = 22
    JMPREL = 23
    FLAGS = 30
    RELRSZ = 35
    RELR = 36
    ANDROID_REL = 0x6000_000F
    ANDROID_RELSZ = 0x6000_0010
    ANDROID_RELA = 0x6000_0011
    ANDROID_RELASZ = 0x6000_0012
    ANDROID_RELR = 0x6FFF_E000
    ANDROID_RELRSZ = 0x6FFF_E001


#: Where tables of relocations are, and how large.
_LOCATIONS: Final = (
    (Tag.RELR, Tag.RELRSZ),
    (Tag.ANDROID_RELR, Tag.ANDROID_RELRSZ),
    (Tag.ANDROID_REL, Tag.ANDROID_RELSZ),
    (Tag.ANDROID_RELA, Tag.ANDROID_RELASZ),
    (Tag.REL, Tag.RELSZ),
    (Tag.RELA, Tag.RELASZ),
    (Tag.JMPREL, Tag.PLTRELSZ),
)


@frozen(slots=True)
class Memory:
    """What segments have from the file, by address."""

    file: ElfFile
    segments: tuple[Segment, ...]

    def view(self, address: int, size: int, name: str) -> memoryview:
        """``size`` bytes at ``address``; raises ImageError where the file has none. ``name`` says what they are."""
        for segment in self.segments:
            place = address - segment.start
            if place >= 0 and place + size <= segment.file_size:
                return self.file.view(segment.offset + place, size, name)
        what = f"{name} at {address:#x}, of {size:#x} bytes, lies in no segment's part of the file"
        raise self.file.error(what, _DEBUG_ONLY)

    def read_up_to(self, address: int, size: int) -> bytes:
        """At most ``size`` bytes at ``address``: fewer where a segment's part of the file or the file ends."""
        for segment in self.segments:
            place = address - segment.start
            if 0 <= place < segment.file_size:
                start = segment.offset + place
                return self.file.data[start : start + min(size, segment.file_size - place)]
        return b""


@frozen(slots=True)
class _Extent:
    """Where the table that an entry locates is in memory; ``size`` is bytes."""

    tag: Tag
    start: int
    size: int

    def within(self, other: _Extent) -> bool:
        inside = other.start <= self.start and self.start + self.size <= other.start + other.size
        return inside and self.tag is not other.tag


class DynamicTable:
    """The dynamic table, whose PT_DYNAMIC header has this ``number`` and ``start`` (p_vaddr).

    Raises ImageError where a table is not in the file, or too large.
    """

    def __init__(self, memory: Memory, layout: Layout, number: int, start: int) -> None:
        self._memory = memory
        self._layout = layout
        self._number = number
        self._start = start
        self._entries = self._read_entries()

    def summary(self) -> Dynamic:
        """What it says by itself."""
        entries = self._entries
        asking = ["DT_TEXTREL"] if Tag.TEXTREL in entries else []
        if entries.get(Tag.FLAGS, 0) & _DF_TEXTREL:
            asking.append("DF_TEXTREL")
        starts = [(f"DT_{tag.name}", entries[tag]) for tag in (Tag.INIT, Tag.FINI) if tag in entries]
        return Dynamic(self._number, self._start, tuple(asking), tuple(starts))

    def relocations(self) -> Iterator[RelocationTable]:
        """All tables of relocations, less one that another contains."""
        extents = [
            _Extent(tag, self._entries[tag], self._entries.get(size, 0))
            for tag, size in _LOCATIONS
            if tag in self._entries
        ]
        for extent in extents:
            # Some linkers count DT_JMPREL, which comes last in it, to DT_RELA.
            contained = extent.tag is Tag.JMPREL and any(extent.within(other) for other in extents)
            if extent.size and not contained:
                yield self._table(extent)

    def symbol(self, index: int) -> str | None:
        """The name of a symbol, None if it has none or is not in the file."""
        size = _SYMBOL_SIZE[self._layout.bits]
        entry = self._memory.read_up_to(self._entries.get(Tag.SYMTAB, 0) + index * size, 4)
        offset = int.from_bytes(entry, self._layout.order)
        name = self._memory.read_up_to(self._entries.get(Tag.STRTAB, 0) + offset, NAME_LIMIT) if offset else b""
        return clean_name(name.split(b"\0")[0]) or None

    def _read_entries(self) -> dict[int, int]:
        structure = self._layout.structure(2)
        data = self._memory.read_up_to(self._start, (DYNAMIC_LIMIT + 1) * structure.size)
        if not data:
            what = f"the dynamic table at {self._start:#x} lies in no segment's part of the file"
            raise self._memory.file.error(what, _DEBUG_ONLY)
        entries: dict[int, int] = {}
        for tag, value in structure.iter_unpack(data[: len(data) // structure.size * structure.size]):
            if tag == Tag.NULL:
                return entries
            entries[tag] = value
        if len(data) > DYNAMIC_LIMIT * structure.size:
            raise self._memory.file.error(f"more than {DYNAMIC_LIMIT} entries in the dynamic table")
        return entries

    def _table(self, extent: _Extent) -> RelocationTable:
        name = f"DT_{extent.tag.name}"
        data = self._memory.view(extent.start, extent.size, name)
        return table_of(name, self._kind(extent.tag), data, self._layout, self._memory.file)

    def _kind(self, tag: Tag) -> Tag:
        if tag is not Tag.JMPREL:
            return tag
        kind = self._entries.get(Tag.PLTREL)
        if kind not in (Tag.REL, Tag.RELA):
            raise self._memory.file.error("DT_PLTREL says neither DT_REL nor DT_RELA for DT_JMPREL")
        return Tag(kind)


def table_of(name: str, kind: Tag, data: memoryview, layout: Layout, file: ElfFile) -> RelocationTable:
    """The table ``data`` of a kind of relocations (REL, RELA, RELR, or Android's); raises ImageError."""
    entries: RelTable | RelrTable | AndroidTable
    if kind in (Tag.REL, Tag.RELA):
        entries = RelTable(data, 2 if kind is Tag.REL else 3, layout)
    elif kind in (Tag.RELR, Tag.ANDROID_RELR):
        entries = RelrTable(data, layout)
    else:
        entries = AndroidTable(data, layout)
    if kind in (Tag.RELR, Tag.ANDROID_RELR) and len(data) > RELOCATIONS_LIMIT * layout.word:
        raise too_many(file)
    try:
        count = len(entries)
        if isinstance(entries, AndroidTable):
            entries.check()
    except PackedError as problem:
        raise file.error(f"{name} {problem}") from None
    return RelocationTable(name, count, entries)


def too_many(file: ElfFile) -> ImageError:
    """The error for more than RELOCATIONS_LIMIT relocations."""
    return file.error(f"more than {RELOCATIONS_LIMIT:,} relocations", "the file is damaged: build it again")
