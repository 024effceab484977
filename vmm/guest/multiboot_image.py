"""Multiboot images, version 1 (Multiboot Specification 0.6.96, 3.1): the header, and what is loaded where.

The header lies on a multiple of 4 within the first 8 KiB of the file::

    +0  magic, 0x1badb002       with flag 16:  +12  header_addr
    +4  flags                                  +16  load_addr
    +8  checksum: the sum of                   +20  load_end_addr
        all three is 0                         +24  bss_end_addr
                                               +28  entry_addr

With flag 16 the addresses say what goes where, whatever the file is (a *flat* image); without it the file is ELF32
or ELF64 and goes to the physical addresses of its program headers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from attrs import evolve, frozen

from vmm.errors import ImageError
from vmm.guest.image import ELF_MAGIC, PAGE, LoadedImage, Segment
from vmm.guest.pc_boot import HIGH_MEMORY, LOW_MEMORY_END, advise
from vmm.guest.symbols import Symbols

#: How many bytes of a file are searched for the header.
SEARCHED: Final = 8192
#: The page of the boot information, which no image may occupy.
INFORMATION: Final = LOW_MEMORY_END

_MAGIC: Final = 0x1BADB002
_MAGIC_2: Final = 0xE85250D6
_ALIGNMENT: Final = 4
_SIZE, _SIZE_WITH_ADDRESSES = 12, 32
_U32: Final = 1 << 32

_ADDRESSES: Final = 1 << 16
_VIDEO: Final = 1 << 2
#: Bits that say what the loader must do: align modules to pages, tell of memory.
_UNDERSTOOD: Final = 1 << 0 | 1 << 1
_REQUIREMENTS: Final = 0xFFFF

_LINK: Final = "link the image again"


@frozen(slots=True)
class Addresses:
    """The address fields of a header; 0 for ``load_end``: up to the end of the file, for ``bss_end``: no bss."""

    header: int
    load: int
    load_end: int
    bss_end: int
    entry: int


@frozen(slots=True)
class Header:
    """A header ``offset`` bytes into its file; ``addresses`` is None unless flag 16 is set."""

    offset: int
    addresses: Addresses | None


def find_header(head: bytes) -> int | None:
    """Where the first header is in a file that starts with ``head``; None if there is none."""
    return next((at for at in _places(head, _MAGIC) if at % _ALIGNMENT == 0 and _is_sound(head, at)), None)


def near_miss(head: bytes) -> str | None:
    """Why a file that starts with ``head`` is no Multiboot image although it looks like one; None if it does not."""
    for at in _places(head, _MAGIC):
        if at % _ALIGNMENT:
            return f"its Multiboot header at {at:#x} is not on a multiple of {_ALIGNMENT}"
        if at + _SIZE <= len(head) and not _is_sound(head, at):
            _, flags, checksum = struct.unpack_from("<III", head, at)
            wanted = -(_MAGIC + flags) % _U32
            return f"its Multiboot header at {at:#x} has the checksum {checksum:#x}, not {wanted:#x}"
    if any(at % 8 == 0 for at in _places(head, _MAGIC_2)):
        return "its Multiboot header is of version 2, not 1"
    return None


def read_multiboot_image(data: bytes, origin: str, memory: int) -> LoadedImage:
    """The image in a Multiboot file ``data``, for a PC with ``memory`` bytes of RAM.

    ``entry`` is a physical address. ``origin`` is the file's name in messages. Raises ``ImageError`` for everything
    that is not exactly right, and for what the header asks for and nobody can give.
    """
    header = _read_header(data, origin)
    if header.addresses is not None:
        image = _flat(data, header.offset, header.addresses, origin, memory)
    elif data.startswith(ELF_MAGIC):
        image = _elf(data, origin, memory)
    else:
        what = "neither ELF nor, as its Multiboot header has no flag 16, with addresses to load it at"
        raise ImageError(what, where=origin, fix="set flag 16 and give the addresses")
    for segment in image.segments:
        if segment.gpa < INFORMATION + PAGE and segment.end > INFORMATION:
            what = f"it occupies {segment.gpa:#x} to {segment.end:#x}, and the boot information is at {INFORMATION:#x}"
            raise ImageError(what, where=origin, fix=f"link it at {HIGH_MEMORY:#x} or above")
    if image.entry is None or not image.holds(image.entry):
        what = "no entry point" if image.entry is None else f"the entry point {image.entry:#x} is outside of the image"
        raise ImageError(what, where=origin, fix=_LINK)
    return image


# The header


def _places(head: bytes, magic: int) -> Iterator[int]:
    wanted, at = struct.pack("<I", magic), -1
    while (at := head.find(wanted, at + 1, SEARCHED)) >= 0:
        yield at


def _is_sound(head: bytes, at: int) -> bool:
    if at + _SIZE > min(len(head), SEARCHED):
        return False
    magic, flags, checksum = struct.unpack_from("<III", head, at)
    return bool((magic + flags + checksum) % _U32 == 0)


def _read_header(data: bytes, origin: str) -> Header:
    offset = find_header(data)
    if offset is None:
        raise ImageError("no Multiboot header", where=origin, fix="give a Multiboot image")
    where = f"{origin}: Multiboot header at {offset:#x}"
    (flags,) = struct.unpack_from("<I", data, offset + 4)
    if flags & _VIDEO:
        fix = "clear flag 2: the guest's console is its serial port"
        raise ImageError("it wants a video mode, and there is no video", where=where, fix=fix)
    if unknown := flags & _REQUIREMENTS & ~_UNDERSTOOD:
        names = ", ".join(str(bit) for bit in range(16) if unknown >> bit & 1)
        what = f"it requires features that are unknown, by flags {names}"
        raise ImageError(what, where=where, fix="set none but flags 0, 1 and 16")
    if not flags & _ADDRESSES:
        return Header(offset, None)
    if offset + _SIZE_WITH_ADDRESSES > len(data):
        raise ImageError("the file ends within its addresses", where=where, fix="build the image again")
    return Header(offset, Addresses(*struct.unpack_from("<5I", data, offset + _SIZE)))


# Flat images


def _flat(data: bytes, offset: int, at: Addresses, origin: str, memory: int) -> LoadedImage:
    where = f"{origin}: Multiboot header at {offset:#x}"
    start = offset - (at.header - at.load)
    if at.header < at.load or start < 0:
        fix = f"give the address of the header, which is {offset:#x} bytes into the file"
        raise ImageError(f"header_addr {at.header:#x} with load_addr {at.load:#x}", where=where, fix=fix)
    end = at.load_end or at.load + len(data) - start
    if end <= at.load:
        raise ImageError(f"load_end_addr {end:#x} is not above load_addr {at.load:#x}", where=where, fix=_LINK)
    if start + end - at.load > len(data):
        what = f"load_end_addr {end:#x} asks for {start + end - at.load:#x} bytes of the file, which has {len(data):#x}"
        raise ImageError(what, where=where, fix="the file is truncated or damaged: build it again")
    if at.bss_end and at.bss_end < end:
        raise ImageError(f"bss_end_addr {at.bss_end:#x} is below {end:#x}, the end of data", where=where, fix=_LINK)
    whole = max(at.bss_end, end)
    if whole > memory:
        what = f"it reaches from {at.load:#x} to {whole:#x}, and RAM ends at {memory:#x}"
        raise ImageError(what, where=where, fix=advise(whole))
    bytes_of_file = data[start : start + end - at.load]
    size = whole - at.load
    segment = Segment(at.load, bytes_of_file, size, readable=True, writable=True, executable=True, gva=at.load)
    return LoadedImage((segment,), at.entry, Symbols())


# ELF images


def _elf(data: bytes, origin: str, memory: int) -> LoadedImage:
    from vmm.guest.elf import parse_elf  # noqa: PLC0415 - 60 ms that a flat image need not pay

    more = "give it more --memory, or link it at a lower physical address"
    image = parse_elf(data, origin, memory, takes_elf32=True, more_memory=more)
    return evolve(image, entry=_physical_entry(image))


def _physical_entry(image: LoadedImage) -> int | None:
    """The entry point as loaders understand it: a virtual address if it is one of the image's, else a physical one."""
    entry = image.entry
    if entry is None:
        return None
    for segment in image.segments:
        if 0 <= entry - segment.gva < segment.memory_size:
            return entry - segment.gva + segment.gpa
    return entry
