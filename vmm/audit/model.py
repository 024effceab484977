"""What an audit knows of an ELF file: the loader's view of it, frozen.

Addresses are virtual addresses as linked (p_vaddr, r_offset), before any load bias; sizes are bytes. *Segment* means
PT_LOAD here: only these are mapped. Numbers of segments are those of their program headers, so that `readelf -lW`
counts the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from attrs import frozen

#: What one mapping is made of, whatever p_align says: the smallest page of all machines that this is about.
PAGE: Final = 4096


@frozen(slots=True)
class Segment:
    """A PT_LOAD header: ``file_size`` bytes at ``offset`` of the file, then zeros, ``size`` bytes in all at ``start``.

    ``number`` is that of the program header, from 0.
    """

    number: int
    start: int
    size: int
    offset: int
    file_size: int
    readable: bool
    writable: bool
    executable: bool

    @property
    def end(self) -> int:
        """The first address after it; beyond the address space if the segment wraps around."""
        return self.start + self.size

    @property
    def pages(self) -> tuple[int, int]:
        """Its first page and the first page after it, as addresses."""
        return self.start & -PAGE, self.end + PAGE - 1 & -PAGE

    @property
    def access(self) -> str:
        """Its permissions as `readelf` writes them: of ``RWE``, with ``-`` for what is missing."""
        letters = (self.readable, "R"), (self.writable, "W"), (self.executable, "E")
        return "".join(letter if has else "-" for has, letter in letters)

    def holds(self, address: int) -> bool:
        """Whether ``address`` lies in it."""
        return self.start <= address < self.end


@frozen(slots=True)
class Section:
    """A section that is part of memory at run time (SHF_ALLOC). Loaders do not look at sections."""

    number: int
    name: str
    start: int
    size: int
    writable: bool
    executable: bool


@frozen(slots=True)
class StackHeader:
    """A PT_GNU_STACK header: whether the stack is to be executable."""

    number: int
    executable: bool


@frozen(slots=True)
class Dynamic:
    """What the dynamic table says: ``number`` is that of the PT_DYNAMIC header.

    ``text_relocations`` names the entries by which it asks for writable text (DT_TEXTREL, DF_TEXTREL); ``starts``
    are the functions that the loader calls (DT_INIT, DT_FINI), by the name of the entry.
    """

    number: int
    start: int
    text_relocations: tuple[str, ...]
    starts: tuple[tuple[str, int], ...]


class Relocation(NamedTuple):
    """A place that the loader writes to.

    ``type`` is the machine's number, None in a table that gives none; ``symbol`` an index of the symbol table or 0.
    """

    address: int
    type: int | None
    symbol: int


@frozen(slots=True)
class RelocationTable:
    """The relocations of one table, named after the entry (DT_RELA) or the section that locates it.

    There are ``count``; ``entries`` are decoded each time that they are gone through, for there may be millions.
    """

    name: str
    count: int
    entries: Iterable[Relocation]


@frozen(slots=True)
class Image:
    """An ELF file. ``machine`` and ``type`` are named as in elf.h, or are hexadecimal numbers.

    ``bits`` is 32 or 64, ``order`` "little" or "big". ``segments`` stand in the order of their headers and none is
    empty. ``sections_unread`` says why there are no sections, where the file claims to have some. ``symbol`` gives the
    name of a symbol by its index, None where it has none or is damaged.
    """

    bits: int
    order: str
    machine: str
    type: str
    entry: int
    file_size: int
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...] = ()
    sections_unread: str | None = None
    stack: tuple[StackHeader, ...] = ()
    dynamic: Dynamic | None = None
    relocations: tuple[RelocationTable, ...] = ()
    symbol: Callable[[int], str | None] = lambda _index: None

    def section_at(self, address: int) -> str | None:
        """The name of the section that ``address`` lies in."""
        within = (s.name for s in self.sections if s.start <= address < s.start + s.size)
        return next(within, None)
