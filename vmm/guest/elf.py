"""ELF64 images, read with suspicion.

pyelftools knows the layout of the headers; what to believe of them is decided here, before anything is
allocated or looked up by a number from the file. Segments go to their p_paddr, and no relocation is applied.
The section headers are used for the symbols alone; a file without them has none.
"""

from __future__ import annotations

import struct
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from elftools.common.exceptions import ELFError
from elftools.common.utils import struct_parse
from elftools.elf.structs import ELFStructs

from vmm.errors import ImageError
from vmm.guest.files import shown
from vmm.guest.image import ELF_MAGIC, LoadedImage, Segment
from vmm.guest.symbols import NAME_LIMIT, SYMBOLS_LIMIT, Rank, Symbol, Symbols, clean_name

if TYPE_CHECKING:
    from collections.abc import Iterator

EHDR_SIZE: Final = 64
PHDR_SIZE: Final = 56
SHDR_SIZE: Final = 64
_SEGMENTS_LIMIT: Final = 128
_SECTIONS_LIMIT: Final = 4096
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
        self._data = data
        self._origin = origin
        self._stream = BytesIO(data)
        self._check_ident()
        self._structs = ELFStructs(little_endian=True, elfclass=64)
        self._structs.create_basic_structs()
        self._structs.create_advanced_structs()
        self.header = self._parse(self._structs.Elf_Ehdr, 0, "the ELF header")
        self._check_header()

    def segments(self, memory: int) -> tuple[Segment, ...]:
        """What PT_LOAD headers ask for, by GPA."""
        found = []
        for index in range(self.header.e_phnum):
            place = self.header.e_phoff + index * PHDR_SIZE
            header = self._parse(self._structs.Elf_Phdr, place, f"program header {index}")
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
        sections = self._sections()
        table = next((s for s in sections if s.sh_type == "SHT_SYMTAB"), None)
        if table is None:
            return
        if table.sh_entsize != _SYMBOL.size or table.sh_size % _SYMBOL.size:
            raise self._error("the symbol table's entries are not 24 bytes each")
        if table.sh_size // _SYMBOL.size > SYMBOLS_LIMIT:
            raise self._error(f"more than {SYMBOLS_LIMIT} symbols", "strip the image")
        if table.sh_link >= len(sections) or sections[table.sh_link].sh_type != "SHT_STRTAB":
            raise self._error("the symbol table has no string table")
        symbols = self._slice(table.sh_offset, table.sh_size, "the symbol table")
        strings = sections[table.sh_link]
        names = self._slice(strings.sh_offset, strings.sh_size, "the string table")
        for offset, info, _, section, value, _ in _SYMBOL.iter_unpack(symbols):
            if info & 0xF in _STT_NAMES_A_PLACE and section not in (_SHN_UNDEF, _SHN_COMMON):
                name = self._name(names, offset)
                if name:
                    yield _symbol(name, info, section, value)

    def _check_ident(self) -> None:
        ident = self._data[:16]
        if not ident.startswith(ELF_MAGIC):
            raise self._error("not an ELF file", 'give an ELF64 image, or set [image].format = "flat"')
        if len(self._data) < EHDR_SIZE:
            raise self._error(f"truncated in the ELF header: {len(self._data)} bytes of {EHDR_SIZE}")
        if ident[4] != 2:
            raise self._error(f"ELF class {ident[4]} is not 64-bit", "link it as elf64-x86-64")
        if ident[5] != 1:
            raise self._error(f"data encoding {ident[5]} is not little-endian", "link it as elf64-x86-64")
        if ident[6] != 1:
            raise self._error(f"ELF version {ident[6]} is unknown")

    def _check_header(self) -> None:
        header = self.header
        if header.e_machine != "EM_X86_64":
            raise self._error(f"machine {shown(header.e_machine)} is not x86-64", "link it as elf64-x86-64")
        if header.e_type not in ("ET_EXEC", "ET_DYN"):
            raise self._error(f"type {shown(header.e_type)} is not an executable", "link it with ld")
        if header.e_version != "EV_CURRENT":
            raise self._error(f"ELF version {shown(header.e_version)} is unknown")
        if header.e_phnum == 0:
            raise self._error("no program headers, so nothing to load")
        if header.e_phentsize != PHDR_SIZE:
            raise self._error(f"program headers of {header.e_phentsize} bytes instead of {PHDR_SIZE}")
        if header.e_phnum > _SEGMENTS_LIMIT:
            raise self._error(f"{header.e_phnum} program headers, more than {_SEGMENTS_LIMIT}")

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
            data=self._slice(header.p_offset, header.p_filesz, name),
            memory_size=size,
            readable=bool(header.p_flags & 4),
            writable=bool(header.p_flags & 2),
            executable=bool(header.p_flags & 1),
            gva=header.p_vaddr,
        )

    def _sections(self) -> list[Any]:
        header = self.header
        if header.e_shoff == 0 or header.e_shnum == 0:
            return []
        if header.e_shentsize != SHDR_SIZE:
            raise self._error(f"section headers of {header.e_shentsize} bytes instead of {SHDR_SIZE}")
        if header.e_shnum > _SECTIONS_LIMIT:
            what = f"{header.e_shnum} section headers, more than {_SECTIONS_LIMIT}"
            raise self._error(what, "strip the image")
        return [
            self._parse(self._structs.Elf_Shdr, header.e_shoff + index * SHDR_SIZE, f"section header {index}")
            for index in range(header.e_shnum)
        ]

    def _name(self, names: bytes, offset: int) -> str:
        end = names.find(b"\0", offset, offset + NAME_LIMIT + 1)
        if offset >= len(names):
            raise self._error(f"a symbol's name is at {offset:#x}, outside of the string table")
        return clean_name(names[offset : end if end >= 0 else offset + NAME_LIMIT])

    def _slice(self, offset: int, size: int, name: str) -> bytes:
        if offset + size > len(self._data):
            what = f"{name} ends at {offset + size:#x} of the file, which has {len(self._data):#x} bytes"
            raise self._error(what, "the file is truncated or damaged: build it again")
        return self._data[offset : offset + size]

    def _parse(self, layout: Any, offset: int, name: str) -> Any:  # noqa: ANN401 - pyelftools' own types
        if offset >= len(self._data):
            raise self._error(f"{name} lies beyond the end of the file", "build the image again")
        try:
            return struct_parse(layout, self._stream, offset)
        except ELFError:
            raise self._error(f"{name} is cut off or damaged", "build the image again") from None

    def _error(self, what: str, fix: str = "build the image again") -> ImageError:
        return ImageError(what, where=self._origin, fix=fix)


def _symbol(name: str, info: int, section: int, value: int) -> Symbol:
    if section == _SHN_ABS:
        return Symbol(name, value, Rank.CONSTANT)
    if name in _LINKER_MARKS:
        return Symbol(name, value, Rank.MARK)
    rank = Rank.GLOBAL if info >> 4 in (_STB_GLOBAL, _STB_WEAK) else Rank.LOCAL
    return Symbol(name, value, rank, is_data=info & 0xF == _STT_OBJECT)
