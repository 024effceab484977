"""The headers of any ELF file, read with suspicion.

pyelftools knows the layout of the headers, of both classes and in both byte orders; what to believe of them is
decided here, before anything is allocated or looked up by a number from the file. What a file may be beyond that
is its reader's business: ``elf.py`` wants a guest, ``vmm.audit`` takes anything that a loader would.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final, Literal

from elftools.common.exceptions import ELFError
from elftools.common.utils import struct_parse
from elftools.elf.structs import ELFStructs

from vmm.errors import ImageError
from vmm.guest.image import ELF_MAGIC

ByteOrder = Literal["little", "big"]

#: Sizes of the ELF header, a program header and a section header in bytes, by class (32, 64 bits).
EHDR_SIZE: Final = {32: 52, 64: 64}
PHDR_SIZE: Final = {32: 32, 64: 56}
SHDR_SIZE: Final = {32: 40, 64: 64}
#: The most section headers that are read.
SECTIONS_LIMIT: Final = 4096
_CLASSES: Final = {1: 32, 2: 64}
_ORDERS: Final[dict[int, ByteOrder]] = {1: "little", 2: "big"}
_AGAIN: Final = "build the image again"


class ElfFile:
    """One ELF file being read: ``origin`` is its name in messages.

    ``bits`` is 32 or 64, ``order`` is "little" or "big", ``header`` pyelftools' view of the ELF header. All
    methods raise ImageError for what the file does not hold.
    """

    def __init__(self, data: bytes, origin: str, *, not_elf: str) -> None:
        """Check the identification and read the header; ``not_elf`` says what to do with something else."""
        self.data: Final = data
        self.origin: Final = origin
        self.bits: Final = self._check_ident(not_elf)
        self.order: Final = _ORDERS[data[5]]
        self._stream = BytesIO(data)
        self._structs = ELFStructs(little_endian=self.order == "little", elfclass=self.bits)
        self._structs.create_basic_structs()
        self._structs.create_advanced_structs()
        self.header: Final = self._parse(self._structs.Elf_Ehdr, 0, "the ELF header")

    def program_headers(self, limit: int) -> list[Any]:
        """What pyelftools makes of each program header, of which there must be one to ``limit``."""
        header, size = self.header, PHDR_SIZE[self.bits]
        if header.e_phnum == 0:
            raise self.error("no program headers, so nothing to load")
        if header.e_phentsize != size:
            raise self.error(f"program headers of {header.e_phentsize} bytes instead of {size}")
        if header.e_phnum > limit:
            raise self.error(f"{header.e_phnum} program headers, more than {limit}")
        return [
            self._parse(self._structs.Elf_Phdr, header.e_phoff + index * size, f"program header {index}")
            for index in range(header.e_phnum)
        ]

    def section_headers(self) -> list[Any]:
        """What pyelftools makes of each section header; none where the file has none."""
        header, size = self.header, SHDR_SIZE[self.bits]
        if header.e_shoff == 0 or header.e_shnum == 0:
            return []
        if header.e_shentsize != size:
            raise self.error(f"section headers of {header.e_shentsize} bytes instead of {size}")
        if header.e_shnum > SECTIONS_LIMIT:
            raise self.error(f"{header.e_shnum} section headers, more than {SECTIONS_LIMIT}", "strip the image")
        return [
            self._parse(self._structs.Elf_Shdr, header.e_shoff + index * size, f"section header {index}")
            for index in range(header.e_shnum)
        ]

    def slice(self, offset: int, size: int, name: str) -> bytes:
        """``size`` bytes of the file from ``offset`` on; ``name`` says what they are."""
        return bytes(self.view(offset, size, name))

    def view(self, offset: int, size: int, name: str) -> memoryview:
        """As ``slice``, but not copied."""
        if offset + size > len(self.data):
            what = f"{name} ends at {offset + size:#x} of the file, which has {len(self.data):#x} bytes"
            raise self.error(what, "the file is truncated or damaged: build it again")
        return memoryview(self.data)[offset : offset + size]

    def error(self, what: str, fix: str = _AGAIN) -> ImageError:
        """The error that says ``what`` is wrong with this file."""
        return ImageError(what, where=self.origin, fix=fix)

    def _check_ident(self, not_elf: str) -> int:
        ident = self.data[:16]
        if not ident.startswith(ELF_MAGIC):
            raise self.error("not an ELF file", not_elf)
        bits = _CLASSES.get(ident[4], 0) if len(ident) == 16 else 64
        if not bits:
            raise self.error(f"ELF class {ident[4]} is neither 32-bit nor 64-bit")
        if len(self.data) < EHDR_SIZE[bits]:
            raise self.error(f"truncated in the ELF header: {len(self.data)} bytes of {EHDR_SIZE[bits]}")
        if ident[5] not in _ORDERS:
            raise self.error(f"data encoding {ident[5]} is neither little-endian nor big-endian")
        if ident[6] != 1:
            raise self.error(f"ELF version {ident[6]} is unknown")
        return bits

    def _parse(self, layout: Any, offset: int, name: str) -> Any:  # noqa: ANN401 - pyelftools' own types
        if offset >= len(self.data):
            raise self.error(f"{name} lies beyond the end of the file")
        try:
            return struct_parse(layout, self._stream, offset)
        except ELFError:
            raise self.error(f"{name} is cut off or damaged") from None
