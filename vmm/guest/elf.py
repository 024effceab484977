"""ELF64 images of guests.

What the headers may claim is checked in ``elf_file.py``, what a guest's image must be, here. Segments go to their
p_paddr, and no relocation is applied. The section headers are used for the symbols alone; a file without them has
none.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from vmm.guest.elf_file import ElfFile
from vmm.guest.files import shown
from vmm.guest.image import LoadedImage, Segment
from vmm.guest.symbols import NAME_LIMIT, SYMBOLS_LIMIT, Rank, Symbol, Symbols, clean_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_SEGMENTS_LIMIT: Final = 128
_ADDRESSES: Final = 1 << 64

# A symbol: st_name, st_info (type 3:0, binding 7:4), st_other, st_shndx, st_value, st_size.
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_STB_GLOBAL, _STB_WEAK = 1, 2
_STT_OBJECT: Final = 1
_STT_NAMES_A_PLACE: Final = (0, _STT_OBJECT, 2)  # NOTYPE, OBJECT, FUNC
_SHN_UNDEF, _SHN_ABS, _SHN_COMMON = 0, 0xFFF1, 0xFFF2
_LINKER_MARKS: Final = {"__bss_start", "_edata", "edata", "_end", "end", "_etext", "etext"}


def parse_elf(data: bytes, origin: str, memory: int) -> LoadedImage:
    """The image in the ELF64 file ``data``, for ``memory`` bytes of RAM; ``origin`` is its name in messages.

    Accepts x86-64 ET_EXEC and ET_DYN; raises ImageError for everything that is not exactly right.
    """
    elf = _Elf(data, origin)
    segments = elf.segments(memory)
    extents = [(segment.gva, segment.gva + segment.memory_size) for segment in segments]
    entry: int = elf.header.e_entry
    return LoadedImage(segments, entry or None, Symbols(elf.symbols(), extents))


class _Elf:
    """One file being read."""

    def __init__(self, data: bytes, origin: str) -> None:
        self._file = ElfFile(data, origin, not_elf='give an ELF64 image, or set [image].format = "flat"')
        self.header = self._file.header
        self._error = self._file.error
        self._check_header()

    def segments(self, memory: int) -> tuple[Segment, ...]:
        """What PT_LOAD headers ask for, by GPA."""
        found = []
        for index, header in enumerate(self._file.program_headers(_SEGMENTS_LIMIT)):
            if header.p_type == "PT_LOAD" and header.p_memsz:
                found.append(self._segment(header, f"segment {index}", memory))
        if not found:
            raise self._error("no PT_LOAD segment, so nothing to load")
        found.sort(key=lambda segment: segment.gpa)
        for before, after in pairwise(found):
            if before.end > after.gpa:
                raise self._error(f"segments overlap at physical address {after.gpa:#x}")
        return tuple(found)

    def symbols(self) -> Iterator[Symbol]:
        """What .symtab names, less files, sections and undefined ones."""
        sections = self._file.section_headers()
        table = next((s for s in sections if s.sh_type == "SHT_SYMTAB"), None)
        if table is None:
            return
        if table.sh_entsize != _SYMBOL.size or table.sh_size % _SYMBOL.size:
            raise self._error("the symbol table's entries are not 24 bytes each")
        if table.sh_size // _SYMBOL.size > SYMBOLS_LIMIT:
            raise self._error(f"more than {SYMBOLS_LIMIT} symbols", "strip the image")
        if table.sh_link >= len(sections) or sections[table.sh_link].sh_type != "SHT_STRTAB":
            raise self._error("the symbol table has no string table")
        symbols = self._file.slice(table.sh_offset, table.sh_size, "the symbol table")
        strings = sections[table.sh_link]
        names = self._file.slice(strings.sh_offset, strings.sh_size, "the string table")
        for offset, info, _, section, value, _ in _SYMBOL.iter_unpack(symbols):
            if info & 0xF in _STT_NAMES_A_PLACE and section not in (_SHN_UNDEF, _SHN_COMMON):
                name = self._name(names, offset)
                if name:
                    yield _symbol(name, info, section, value)

    def _check_header(self) -> None:
        file, header = self._file, self.header
        if file.bits != 64:
            raise self._error(f"a {file.bits}-bit ELF file, not 64-bit", "link it as elf64-x86-64")
        if file.order != "little":
            raise self._error(f"{file.order}-endian, not little-endian", "link it as elf64-x86-64")
        if header.e_machine != "EM_X86_64":
            raise self._error(f"machine {shown(header.e_machine)} is not x86-64", "link it as elf64-x86-64")
        if header.e_type not in ("ET_EXEC", "ET_DYN"):
            raise self._error(f"type {shown(header.e_type)} is not an executable", "link it with ld")
        if header.e_version != "EV_CURRENT":
            raise self._error(f"ELF version {shown(header.e_version)} is unknown")

    def _segment(self, header: Any, name: str, memory: int) -> Segment:  # noqa: ANN401 - a pyelftools container
        size = header.p_memsz
        if size < header.p_filesz:
            raise self._error(f"{name} has {header.p_filesz:#x} bytes of file for {size:#x} of memory")
        for field in ("p_vaddr", "p_paddr"):
            if header[field] + size > _ADDRESSES:
                raise self._error(f"{name} wraps around: {field} {header[field]:#x} and {size:#x} bytes")
        if header.p_paddr + size > memory:
            end = header.p_paddr + size
            what = f"{name} reaches from {header.p_paddr:#x} to {end:#x}, RAM ends at {memory:#x}"
            raise self._error(what, "raise [machine].memory, or link it at a lower physical address")
        return Segment(
            gpa=header.p_paddr,
            data=self._file.slice(header.p_offset, header.p_filesz, name),
            memory_size=size,
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
