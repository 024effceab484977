"""A minimal ELF64 writer, independent of the code under test."""

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
class Elf:
    loads: list = field(default_factory=lambda: [Load()])
    entry: int = 0x10000
    ident: bytes = b"\x7fELF\x02\x01\x01" + bytes(9)
    type: int = 2
    machine: int = 62
    version: int = 1
    phentsize: int = 56
    phnum: int | None = None
    shentsize: int = 64
    shnum: int | None = None
    # (name, st_info, st_shndx, st_value)
    symbols: list = field(default_factory=list)
    symbol_entsize: int = 24
    symbol_link: int = 2
    name_offset: int = 0
    names_in_front: bytes = b""

    def build(self) -> bytes:
        at = 64 + 56 * len(self.loads)
        headers, body = b"", b""
        for load in self.loads:
            size = len(load.data)
            headers += PHDR.pack(
                load.type,
                load.flags,
                at + len(body) if load.offset is None else load.offset,
                load.paddr if load.vaddr is None else load.vaddr,
                load.paddr,
                size if load.filesz is None else load.filesz,
                size if load.memsz is None else load.memsz,
                0x1000,
            )
            body += load.data
        shoff, tail, shnum = 0, b"", 0
        if self.symbols:
            names, table = bytearray(self.names_in_front + b"\0"), bytearray(SYM.size)
            for name, info, section, value in self.symbols:
                table += SYM.pack(len(names) + self.name_offset, info, 0, section, value, 0)
                names += name.encode() + b"\0"
            start = at + len(body)
            shoff, shnum = start + len(table) + len(names), 3
            tail = table + names + bytes(64)
            tail += SHDR.pack(0, 2, 0, 0, start, len(table), self.symbol_link, 1, 8, self.symbol_entsize)
            tail += SHDR.pack(0, 3, 0, 0, start + len(table), len(names), 0, 0, 1, 0)
        header = EHDR.pack(
            self.ident,
            self.type,
            self.machine,
            self.version,
            self.entry,
            64,
            shoff,
            0,
            64,
            self.phentsize,
            len(self.loads) if self.phnum is None else self.phnum,
            self.shentsize,
            shnum if self.shnum is None else self.shnum,
            0,
        )
        return header + headers + body + tail
