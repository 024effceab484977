"""Multiboot images, made from assembly text, and a reader of what a kernel is given that knows the specification."""

from __future__ import annotations

import struct
from pathlib import Path

import tiny
from guest.elf_builder import Elf, Load

from vmm.guest.loader import Guest
from vmm.guest.multiboot import load_multiboot
from vmm.machine import Machine, RunOptions

MAGIC = 0x1BADB002
#: Where a flat image of these tests starts, its code behind the header, and a stack.
LOAD = 0x100000
ENTRY = LOAD + 32
STACK = 0x180000
MEMORY = 4 << 20
EXIT = "out 0xf4, al;"


def header(flags: int = 0x10003, addresses: tuple[int, ...] = (), *, magic: int = MAGIC, checksum: int | None = None):
    words = (magic, flags, -(magic + flags) % (1 << 32) if checksum is None else checksum, *addresses)
    return struct.pack(f"<{len(words)}I", *(word % (1 << 32) for word in words))


def flat(code: bytes, *, before: int = 0, flags: int = 0x10003, **fields: int) -> bytes:
    """A file of ``before`` bytes, a header, and ``code``; ``fields`` are those of the header."""
    given = {"header": LOAD + before, "load": LOAD, "load_end": 0, "bss_end": 0, "entry": ENTRY + before, **fields}
    return bytes(before) + header(flags, tuple(given.values())) + code


def code(source: str) -> bytes:
    return tiny.assemble(source, ENTRY, 32)


def elf32(source: str, *, at: int = LOAD, **fields) -> bytes:
    """An ELF32 image with the header in front of its code."""
    data = header(3) + tiny.assemble(source, at + 12, 32)
    return Elf([Load(at, data)], **{"bits": 32, "machine": 3, "entry": at + 12, **fields}).build()


def load(folder: Path, image: bytes, **options) -> Guest:
    path = folder / "kernel.flat"
    path.write_bytes(image)
    return load_multiboot(path, **{"memory": MEMORY, **options})


def build(folder: Path, image: bytes, *, options: RunOptions | None = None, **rest) -> tiny.Tiny:
    """A PC that runs an image, with all that it reports kept."""
    return tiny.watch(Machine(load(folder, image, **rest), options or RunOptions(check=True, audit=True)))


class Information:
    """The boot information that a guest is given, field by field, as section 3.3 lays it out."""

    def __init__(self, guest: Guest) -> None:
        self.writes = guest.boot.writes
        self.address = guest.boot.cpus[0].gprs["rbx"]

    def bytes_at(self, address: int, size: int) -> bytes:
        for gpa, data in self.writes:
            if gpa <= address and address + size <= gpa + len(data):
                return data[address - gpa : address - gpa + size]
        raise AssertionError(f"nothing at {address:#x}")

    def word(self, address: int) -> int:
        return int.from_bytes(self.bytes_at(address, 4), "little")

    def text(self, address: int) -> bytes:
        found = b""
        while (byte := self.bytes_at(address + len(found), 1)) != b"\0":
            found += byte
        return found

    def field(self, offset: int) -> int:
        return self.word(self.address + offset)

    @property
    def memory_map(self) -> list[tuple[int, int, int]]:
        at, found = self.field(48), []
        while at < self.field(48) + self.field(44):
            found.append(struct.unpack("<QQI", self.bytes_at(at + 4, 20)))
            at += 4 + self.word(at)
        assert at == self.field(48) + self.field(44)
        return found

    @property
    def modules(self) -> list[tuple[int, int, bytes]]:
        entries = [self.field(24) + 16 * number for number in range(self.field(20))]
        return [(self.word(at), self.word(at + 4), self.text(self.word(at + 8))) for at in entries]
