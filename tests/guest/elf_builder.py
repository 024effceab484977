"""A minimal ELF writer, independent of the code under test: both classes, both byte orders.

``EHDR``, ``PHDR``, ``SHDR`` and ``SYM`` are the structures of ELF64 in little-endian order.
"""

import struct
from dataclasses import dataclass, field

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
SHDR = struct.Struct("<IIQQQQIIQQ")
SYM = struct.Struct("<IBBHQQ")


@dataclass
class Load:
    paddr: int = 0x10000
    data: bytes = b"\x90\xf4"
    vaddr: int | None = None
    memsz: int | None = None
    filesz: int | None = None
    offset: int | None = None
    flags: int = 5
    type: int = 1


@dataclass
class Section:
    """A section header; ``data`` goes to the end of the file unless ``offset`` says where it is."""

    name: str
    type: int = 1
    flags: int = 2
    addr: int = 0
    data: bytes = b""
    offset: int | None = None
    size: int | None = None


@dataclass
class Elf:
    loads: list = field(default_factory=lambda: [Load()])
    entry: int = 0x10000
    ident: bytes | None = None
    bits: int = 64
    order: str = "<"
    type: int = 2
    machine: int = 62
    version: int = 1
    phentsize: int | None = None
    phnum: int | None = None
    shentsize: int | None = None
    shnum: int | None = None
    # (name, st_info, st_shndx, st_value)
    symbols: list = field(default_factory=list)
    symbol_entsize: int = 24
    symbol_link: int = 2
    name_offset: int = 0
    names_in_front: bytes = b""
    sections: list = field(default_factory=list)

    def build(self) -> bytes:
        at = self.layout("ehdr").size + self.layout("phdr").size * len(self.loads)
        headers, body = b"", b""
        for load in self.loads:
            headers += self._program_header(load, at + len(body))
            body += load.data
        shoff, shnum, tail = self._tail(at + len(body))
        return self._elf_header(shoff, shnum) + headers + body + tail

    def layout(self, name: str) -> struct.Struct:
        """The structure of a header; those of ELF32 have narrower fields, and its program headers another order."""
        given = {"ehdr": EHDR, "phdr": PHDR, "shdr": SHDR, "sym": SYM}[name].format.lstrip("<")
        if self.bits == 32:
            given = "IIIIIIII" if name == "phdr" else "IIIBBH" if name == "sym" else given.replace("Q", "I")
        return struct.Struct(self.order + given)

    def words(self, *values: int) -> bytes:
        """Values of an address's size, in a row."""
        mask = (1 << self.bits) - 1
        letter = "Q" if self.bits == 64 else "I"
        return struct.pack(f"{self.order}{len(values)}{letter}", *(value & mask for value in values))

    def _program_header(self, load: Load, here: int) -> bytes:
        size = len(load.data)
        fields = [
            here if load.offset is None else load.offset,
            load.paddr if load.vaddr is None else load.vaddr,
            load.paddr,
            size if load.filesz is None else load.filesz,
            size if load.memsz is None else load.memsz,
        ]
        if self.bits == 32:
            return self.layout("phdr").pack(load.type, *fields, load.flags, 0x1000)
        return self.layout("phdr").pack(load.type, load.flags, *fields, 0x1000)

    def _elf_header(self, shoff: int, shnum: int) -> bytes:
        phdr, shdr = self.layout("phdr").size, self.layout("shdr").size
        ehdr = self.layout("ehdr")
        ident = b"\x7fELF" + bytes([self.bits // 32, "<>".index(self.order) + 1, 1]) + bytes(9)
        return ehdr.pack(
            ident if self.ident is None else self.ident,
            self.type,
            self.machine,
            self.version,
            self.entry,
            ehdr.size,
            shoff,
            0,
            ehdr.size,
            phdr if self.phentsize is None else self.phentsize,
            len(self.loads) if self.phnum is None else self.phnum,
            shdr if self.shentsize is None else self.shentsize,
            shnum if self.shnum is None else self.shnum,
            shnum - 1 if self.sections else 0,
        )

    def _tail(self, start: int) -> tuple[int, int, bytes]:
        """Where the section headers are, how many there are, and all that is behind the segments."""
        if self.symbols:
            return self._symbol_sections(start)
        if self.sections:
            return self._named_sections(start)
        return 0, 0, b""

    def _symbol_sections(self, start: int) -> tuple[int, int, bytes]:
        sym, shdr = self.layout("sym"), self.layout("shdr")
        names, table = bytearray(self.names_in_front + b"\0"), bytearray(sym.size)
        for name, info, section, value in self.symbols:
            at = len(names) + self.name_offset
            narrow, wide = (at, value, 0, info, 0, section), (at, info, 0, section, value, 0)
            table += sym.pack(*(narrow if self.bits == 32 else wide))
            names += name.encode() + b"\0"
        tail = table + names + bytes(shdr.size)
        tail += shdr.pack(0, 2, 0, 0, start, len(table), self.symbol_link, 1, 8, self.symbol_entsize)
        tail += shdr.pack(0, 3, 0, 0, start + len(table), len(names), 0, 0, 1, 0)
        return start + len(table) + len(names), 3, bytes(tail)

    def _named_sections(self, start: int) -> tuple[int, int, bytes]:
        names, data, headers = b"\0", b"", bytes(self.layout("shdr").size)
        strings = Section(".shstrtab", type=3, flags=0)
        for section in [*self.sections, strings]:
            name, names = len(names), names + section.name.encode() + b"\0"
            content = names if section is strings else section.data
            offset = start + len(data) if section.offset is None else section.offset
            size = len(content) if section.size is None else section.size
            place = (section.addr, offset, size)
            headers += self.layout("shdr").pack(name, section.type, section.flags, *place, 0, 0, 1, 0)
            data += content
        return start + len(data), len(self.sections) + 2, data + headers
