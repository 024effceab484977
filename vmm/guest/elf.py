"""ELF images of guests: ELF64, and ELF32 where the guest is entered in protected mode.

What the headers may claim is checked in ``elf_file.py``, what a guest's image must be, here. Segments go to their
p_paddr, and no relocation is applied. The section headers are used for the symbols alone; a file without them has
none.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from vmm.guest.elf_file import ElfFile
from vmm.guest.files import shown
from vmm.guest.image import LoadedImage, Segment
from vmm.guest.symbols import NAME_LIMIT, SYMBOLS_LIMIT, Rank, Symbol, Symbols, clean_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_SEGMENTS_LIMIT: Final = 128
_ADDRESSES: Final = 1 << 64

# A symbol, and where in it st_name, st_info (type 3:0, binding 7:4), st_shndx and st_value are. 64 bits: st_name,
# st_info, st_other, st_shndx, st_value, st_size; 32 bits: st_name, st_value, st_size, st_info, st_other, st_shndx.
_SYMBOL: Final = {
    32: (struct.Struct("<IIIBBH"), itemgetter(0, 3, 5, 1)),
    64: (struct.Struct("<IBBHQQ"), itemgetter(0, 1, 3, 4)),
}
_MACHINES: Final = {32: "EM_386", 64: "EM_X86_64"}
_MACHINE_NAMES: Final = {32: "i386", 64: "x86-64"}
_MORE_MEMORY: Final = "raise [machine].memory, or link it at a lower physical address"
_STB_GLOBAL, _STB_WEAK = 1, 2
_STT_OBJECT: Final = 1
_STT_NAMES_A_PLACE: Final = (0, _STT_OBJECT, 2)  # NOTYPE, OBJECT, FUNC
_SHN_UNDEF, _SHN_ABS, _SHN_COMMON = 0, 0xFFF1, 0xFFF2
_LINKER_MARKS: Final = {"__bss_start", "_edata", "edata", "_end", "end", "_etext", "etext"}


def parse_elf(
    data: bytes, origin: str, memory: int, *, takes_elf32: bool = False, more_memory: str = _MORE_MEMORY
) -> LoadedImage:
    """The image in the ELF64 file ``data``, for ``memory`` bytes of RAM; ``origin`` is its name in messages.

    Accepts x86-64 ET_EXEC and ET_DYN, with ``takes_elf32`` also those of i386 in ELF32; raises ImageError for
    everything that is not exactly right. ``more_memory`` is the advice for an image that does not fit into RAM.
    """
    elf = _Elf(data, origin, takes_elf32=takes_elf32, more_memory=more_memory)
    segments = elf.segments(memory)
    extents = [(segment.gva, segment.gva + segment.memory_size) for segment in segments]
    entry: int = elf.header.e_entry
    return LoadedImage(segments, entry or None, Symbols(elf.symbols(), extents))


class _Elf:
    """One file being read."""

    def __init__(self, data: bytes, origin: str, *, takes_elf32: bool, more_memory: str) -> None:
        self._file = ElfFile(data, origin, not_elf='give an ELF64 image, or set [image].format = "flat"')
        self.header = self._file.header
        self._error = self._file.error
        self._more_memory = more_memory
        self._check_header(takes_elf32=takes_elf32)

    def segments(self, memory: int) -> tuple[Segment, ...]:
        """What PT_LOAD headers ask for, by GPA."""
        found = []
        for index, header in enumerate(self._file.program_headers(_SEGMENTS_LIMIT)):
            if header.p_type == "PT_LOAD" and header.p_memsz:
                self._check_extent(header, f"segment {index}", memory)
                found.append((header.p_paddr, header, f"segment {index}"))
        if not found:
            raise self._error("no PT_LOAD segment, so nothing to load")
        found.sort(key=lambda entry: entry[0])
        for (before, header, _), (after, _, _) in pairwise(found):
            if before + header.p_memsz > after:
                raise self._error(f"segments overlap at physical address {after:#x}")
        # Only now are bytes copied: no more than there is RAM.
        return tuple(self._segment(header, name) for _, header, name in found)

    def symbols(self) -> Iterator[Symbol]:
        """What .symtab names, less files, sections and undefined ones."""
        sections = self._file.section_headers()
        table = next((s for s in sections if s.sh_type == "SHT_SYMTAB"), None)
        if table is None:
            return
        layout, parts = _SYMBOL[self._file.bits]
        if table.sh_entsize != layout.size or table.sh_size % layout.size:
            raise self._error(f"the symbol table's entries are not {layout.size} bytes each")
        if table.sh_size // layout.size > SYMBOLS_LIMIT:
            raise self._error(f"more than {SYMBOLS_LIMIT} symbols", "strip the image")
        if table.sh_link >= len(sections) or sections[table.sh_link].sh_type != "SHT_STRTAB":
            raise self._error("the symbol table has no string table")
        symbols = self._file.slice(table.sh_offset, table.sh_size, "the symbol table")
        strings = sections[table.sh_link]
        names = self._file.slice(strings.sh_offset, strings.sh_size, "the string table")
        for values in layout.iter_unpack(symbols):
            offset, info, section, value = parts(values)
            if info & 0xF in _STT_NAMES_A_PLACE and section not in (_SHN_UNDEF, _SHN_COMMON):
                name = self._name(names, offset)
                if name:
                    yield _symbol(name, info, section, value)

    def _check_header(self, *, takes_elf32: bool) -> None:
        file, header = self._file, self.header
        link = "link it as elf32-i386" if takes_elf32 else "link it as elf64-x86-64"
        if file.bits != 64 and not takes_elf32:
            raise self._error(f"a {file.bits}-bit ELF file, not 64-bit", link)
        if file.order != "little":
            raise self._error(f"{file.order}-endian, not little-endian", link)
        if header.e_machine != _MACHINES[file.bits]:
            raise self._error(f"machine {shown(header.e_machine)} is not {_MACHINE_NAMES[file.bits]}", link)
        if header.e_type not in ("ET_EXEC", "ET_DYN"):
            raise self._error(f"type {shown(header.e_type)} is not an executable", "link it with ld")
        if header.e_version != "EV_CURRENT":
            raise self._error(f"ELF version {shown(header.e_version)} is unknown")

    def _check_extent(self, header: Any, name: str, memory: int) -> None:  # noqa: ANN401 - a pyelftools container
        size = header.p_memsz
        if size < header.p_filesz:
            raise self._error(f"{name} has {header.p_filesz:#x} bytes of file for {size:#x} of memory")
        for field in ("p_vaddr", "p_paddr"):
            if header[field] + size > _ADDRESSES:
                raise self._error(f"{name} wraps around: {field} {header[field]:#x} and {size:#x} bytes")
        if header.p_paddr + size > memory:
            end = header.p_paddr + size
            what = f"{name} reaches from {header.p_paddr:#x} to {end:#x}, RAM ends at {memory:#x}"
            raise self._error(what, self._more_memory)

    def _segment(self, header: Any, name: str) -> Segment:  # noqa: ANN401 - as above
        return Segment(
            gpa=header.p_paddr,
            data=self._file.slice(header.p_offset, header.p_filesz, name),
            memory_size=header.p_memsz,
            readable=bool(header.p_flags & 4),
            writable=bool(header.p_flags & 2),
            executable=bool(header.p_flags & 1),
            gva=header.p_vaddr,
        )

    def _name(self, names: bytes, offset: int) -> str:
        end = names.find(b"\0", offset, offset + NAME_LIMIT + 1)
        if offset >= len(names):
            raise self._error(f"a symbol's name is at {offset:#x}, outside of the string table")
        return clean_name(names[offset : end if end >= 0 else offset + NAME_LIMIT])


def _symbol(name: str, info: int, section: int, value: int) -> Symbol:
    if section == _SHN_ABS:
        return Symbol(name, value, Rank.CONSTANT)
    if name in _LINKER_MARKS:
        return Symbol(name, value, Rank.MARK)
    rank = Rank.GLOBAL if info >> 4 in (_STB_GLOBAL, _STB_WEAK) else Rank.LOCAL
    return Symbol(name, value, rank, is_data=info & 0xF == _STT_OBJECT)
