"""From the bytes of an ELF file to the model that the rules are about.

Refused is what the question cannot be answered for: no ELF file, headers or tables of the loader that are not in the
file, an object that no loader maps. Section headers are for people: where they are damaged, the audit goes on
without them and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from vmm.audit.model import Image, RelocationTable, Section, Segment, StackHeader
from vmm.audit.packed import Layout
from vmm.audit.tables import RELOCATIONS_LIMIT, DynamicTable, Memory, Tag, table_of, too_many
from vmm.errors import ImageError
from vmm.guest.elf_file import ElfFile
from vmm.guest.symbols import NAME_LIMIT, clean_name

#: The most program headers; Linux takes no more than fit into 64 KiB, which are 1170.
SEGMENTS_LIMIT: Final = 1024
_PF_X, _PF_W, _PF_R = 1, 2, 4
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR = 1, 2, 4
_LOADED: Final = ("ET_EXEC", "ET_DYN")
_KINDS: Final = {"SHT_REL": Tag.REL, "SHT_RELA": Tag.RELA, "SHT_RELR": Tag.RELR}
_NOT_ELF: Final = "give an ELF executable or shared object"


def read_image(data: bytes, origin: str) -> Image:
    """The ELF file ``data``; ``origin`` is its name in messages. Raises ImageError."""
    return _Reader(ElfFile(data, origin, not_elf=_NOT_ELF)).image()


class _Reader:
    """One file being read."""

    def __init__(self, file: ElfFile) -> None:
        self._file = file
        self._machine = _named(file.header.e_machine)
        self._layout = Layout(file.bits, file.order, self._machine)
        if file.header.e_type not in _LOADED:
            what = f"a file of type {_named(file.header.e_type)}, which no loader maps"
            raise file.error(what, "link it, and audit the executable or shared object")
        self._headers = file.program_headers(SEGMENTS_LIMIT)

    def image(self) -> Image:
        segments = tuple(self._segments())
        if not segments:
            raise self._file.error("no PT_LOAD segment, so nothing to audit")
        sections, unread = self._sections()
        dynamic = self._dynamic(segments)
        return Image(
            bits=self._file.bits,
            order=self._file.order,
            machine=self._machine,
            type=_named(self._file.header.e_type),
            entry=self._file.header.e_entry,
            file_size=len(self._file.data),
            segments=segments,
            sections=tuple(_section(number, name, header) for number, name, header in sections),
            sections_unread=unread,
            stack=tuple(self._stack()),
            dynamic=dynamic.summary() if dynamic else None,
            relocations=tuple(self._bounded(dynamic.relocations() if dynamic else self._static_relocations(sections))),
            symbol=dynamic.symbol if dynamic else lambda _index: None,
        )

    def _segments(self) -> Iterator[Segment]:
        for number, header in enumerate(self._headers):
            if header.p_type == "PT_LOAD" and (header.p_memsz or header.p_filesz):
                yield Segment(
                    number=number,
                    start=header.p_vaddr,
                    size=header.p_memsz,
                    offset=header.p_offset,
                    file_size=header.p_filesz,
                    readable=bool(header.p_flags & _PF_R),
                    writable=bool(header.p_flags & _PF_W),
                    executable=bool(header.p_flags & _PF_X),
                )

    def _stack(self) -> Iterator[StackHeader]:
        for number, header in enumerate(self._headers):
            if header.p_type == "PT_GNU_STACK":
                yield StackHeader(number, bool(header.p_flags & _PF_X))

    def _dynamic(self, segments: tuple[Segment, ...]) -> DynamicTable | None:
        found = [(number, h.p_vaddr) for number, h in enumerate(self._headers) if h.p_type == "PT_DYNAMIC"]
        if len(found) > 1:
            raise self._file.error(f"{len(found)} PT_DYNAMIC headers: which one counts depends on the loader")
        return DynamicTable(Memory(self._file, segments), self._layout, *found[0]) if found else None

    def _bounded(self, tables: Iterator[RelocationTable]) -> Iterator[RelocationTable]:
        total = 0
        for table in tables:
            total += table.count
            if total > RELOCATIONS_LIMIT:
                raise too_many(self._file)
            yield table

    def _sections(self) -> tuple[list[tuple[int, str, Any]], str | None]:
        """Number, name and header of all sections with SHF_ALLOC, or why there are none."""
        try:
            headers = self._file.section_headers()
            names = self._section_names(headers)
        except ImageError as problem:
            return [], problem.what
        return [
            (number, _name(names, header.sh_name), header)
            for number, header in enumerate(headers)
            if header.sh_flags & _SHF_ALLOC
        ], None

    def _section_names(self, headers: list[Any]) -> bytes:
        index = self._file.header.e_shstrndx
        if not 0 < index < len(headers):
            return b""
        return self._file.slice(headers[index].sh_offset, headers[index].sh_size, "the names of sections")

    def _static_relocations(self, sections: list[tuple[int, str, Any]]) -> Iterator[RelocationTable]:
        """Those that a static executable's own start-up code applies (IRELATIVE): only sections tell of them."""
        for _, name, header in sections:
            kind = _KINDS.get(header.sh_type)
            if kind is not None:
                data = self._file.view(header.sh_offset, header.sh_size, name or "a section of relocations")
                yield table_of(name, kind, data, self._layout, self._file)


def _section(number: int, name: str, header: Any) -> Section:  # noqa: ANN401 - a pyelftools container
    flags = header.sh_flags
    return Section(
        number, name, header.sh_addr, header.sh_size, bool(flags & _SHF_WRITE), bool(flags & _SHF_EXECINSTR)
    )


def _name(names: bytes, offset: int) -> str:
    return clean_name(names[offset : offset + NAME_LIMIT].split(b"\0")[0])


def _named(value: object) -> str:
    """A value of the header as elf.h names it, or as a number."""
    return value if isinstance(value, str) else f"{value:#x}"
