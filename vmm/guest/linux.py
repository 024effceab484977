"""The Linux/x86 boot protocol, 64-bit entry (Documentation/arch/x86/boot.rst), for a bzImage or a vmlinux.

What the kernel finds when it is entered, in physical memory that is mapped to itself up to 4 GiB::

    0x01000   GDT: code at selector 0x10, data at 0x18
    0x02000   zero page (struct boot_params), its address in RSI
    0x03000   command line
    0x10000   page tables, 2 MiB pages
    0x9f000   the end of low memory, as the e820 map says
    kernel    a bzImage's protected-mode part at its preferred address, entered 0x200 bytes behind its start;
              a vmlinux's segments at their physical addresses, entered where its header says
    initrd    as high as the kernel allows

Interrupts are off. Paging is on, and long mode.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from attrs import frozen

from vmm.cpu.state import Segment as SegmentRegister
from vmm.errors import ImageError, OptionError
from vmm.guest import acpi
from vmm.guest.boot import BootState, SystemArea
from vmm.guest.files import one_line, read_file
from vmm.guest.image import ELF_FILE_LIMIT, ELF_MAGIC, LoadedImage, Segment
from vmm.guest.loader import BootProtocol, Guest
from vmm.guest.manifest import MEMORY_LIMIT, CpuSpec, End, Image, Limits, MachineSpec, Manifest, Policy
from vmm.guest.pc_boot import HIGH_MEMORY, MIB, advise, check_memory, encode_command_line, memory_map, processor
from vmm.guest.symbols import Symbols

#: What a trace calls it.
PROTOCOL: Final = "linux"
PAGE: Final = 4096
#: Bytes of RAM that a kernel gets unless told otherwise.
DEFAULT_MEMORY: Final = 256 * MIB
#: What a kernel's accesses to its code cost follows how many there are.
ADAPTIVE: Final = Policy(reads="adaptive", writes="adaptive")

_GDT: Final = 0x1000
_ZERO_PAGE: Final = 0x2000
_COMMAND_LINE: Final = 0x3000
_TABLES: Final = 0x10000
_IDENTITY_MAPPED: Final = 4

_FILE_LIMIT: Final = 256 * MIB
_SECTOR: Final = 512
_SETUP_SECTORS: Final = 0x1F1
_HEADER: Final = 0x1F1
_BOOT_FLAG: Final = 0x1FE
_MAGIC: Final = 0x202
_VERSION: Final = 0x206
_TYPE_OF_LOADER: Final = 0x210
_RAMDISK: Final = 0x218
_COMMAND_LINE_POINTER: Final = 0x228
_INITRD_MAX: Final = 0x22C
_LOAD_FLAGS: Final = 0x236
_COMMAND_LINE_SIZE: Final = 0x238
_PREFERRED_ADDRESS: Final = 0x258
_INIT_SIZE: Final = 0x260
_HEADER_END: Final = 0x268
_E820_COUNT: Final = 0x1E8
_E820_TABLE: Final = 0x2D0

_XLF_KERNEL_64: Final = 1
_ENTRY_64: Final = 0x200
#: The first version of the protocol with a preferred address and 64-bit entry flags.
_OLDEST_VERSION: Final = 0x20C
_UNDEFINED_LOADER: Final = 0xFF
_LOADED_HIGH: Final = 1
_DEFAULT_COMMAND_LINE_SIZE: Final = 2047
_DEFAULT_INITRD_MAX: Final = 0x7FFF_FFFF

_CR0: Final = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1 << 0  # PG WP NE ET MP PE
_CR4_PAE: Final = 1 << 5
_EFER: Final = 1 << 11 | 1 << 10 | 1 << 8  # NXE LMA LME
_CODE_64: Final = SegmentRegister(0x10, 0, 0xFFFF_FFFF, 0xA09B)
_DATA: Final = SegmentRegister(0x18, 0, 0xFFFF_FFFF, 0xC093)
_DESCRIPTORS: Final = struct.pack("<QQQQ", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


@frozen(slots=True)
class _Kernel:
    """A kernel to be loaded: where it is entered, what goes where, and its half of the zero page.

    ``end`` is the first address behind all that it uses before it knows how much memory there is.
    """

    entry: int
    image: LoadedImage
    zero_page: bytearray
    end: int


def load_linux(
    kernel: Path,
    *,
    initrd: Path | None = None,
    command_line: str = "",
    memory: int = DEFAULT_MEMORY,
    policy: Policy | None = None,
    seconds: float = 300.0,
    apic: bool = True,
) -> Guest:
    """A PC that enters a Linux kernel; raises ``ImageError`` for its files, ``OptionError`` for the rest.

    ``memory`` is the size of its RAM in bytes, a multiple of 2 MiB up to 1 GiB. The run ends when the guest halts
    with interrupts off, resets the machine, or writes to port 0xf4. With ``apic`` it has a local APIC, an I/O APIC, and
    the ACPI tables that tell of them.
    """
    check_memory(memory)
    found = _read_kernel(kernel, memory)
    data = b"" if initrd is None else _read_initrd(initrd)
    writes = [(segment.gpa, segment.data) for segment in found.image.segments if segment.data]
    writes += _initrd(found, data, memory, initrd)
    writes += _command_line(found, command_line)
    writes += [(acpi.PLACE, acpi.tables())] if apic else []
    _fill_zero_page(found.zero_page, memory)
    writes += [(_GDT, _DESCRIPTORS), (_ZERO_PAGE, bytes(found.zero_page)), (_TABLES, _page_tables())]
    manifest = Manifest(
        path=kernel,
        name=one_line(kernel.name),
        image=Image("flat", kernel, 0),
        machine=MachineSpec(memory, "long"),
        cpu=CpuSpec(found.entry),
        paging=None,
        summary="Linux, entered by the 64-bit boot protocol",
        policy=policy or ADAPTIVE,
        end=End(halt=True),
        limits=Limits(exits=1 << 62, seconds=seconds),
    )
    boot = _boot_state(found.entry, memory, writes)
    protocol = BootProtocol(PROTOCOL, command_line, () if initrd is None else (initrd,), apic=apic)
    return Guest(manifest, found.image, found.entry, boot=boot, is_pc=True, protocol=protocol)


# The kernel


def is_bz_image(head: bytes) -> bool:
    """Whether a file that starts with ``head`` has the header of the boot protocol."""
    return head[_MAGIC : _MAGIC + 4] == b"HdrS" and len(head) >= _HEADER_END


def _read_kernel(path: Path, memory: int) -> _Kernel:
    data = read_file(path, _FILE_LIMIT, error=ImageError, fix="give the path of a bzImage or a vmlinux")
    if data.startswith(ELF_MAGIC):
        kernel = _vmlinux(path, data, memory)
    elif is_bz_image(data):
        kernel = _bz_image(path, data)
    else:
        raise ImageError("neither a bzImage nor a vmlinux", where=one_line(path), fix="give an x86-64 Linux kernel")
    if kernel.end > memory:
        what = f"the kernel needs memory up to {kernel.end:#x}, and RAM ends at {memory:#x}"
        raise ImageError(what, where=one_line(path), fix=advise(kernel.end))
    return kernel


def _bz_image(path: Path, data: bytes) -> _Kernel:
    version = _field("<H", data, _VERSION)
    if version < _OLDEST_VERSION or not _field("<H", data, _LOAD_FLAGS) & _XLF_KERNEL_64:
        what = f"no 64-bit entry (boot protocol {version >> 8}.{version & 0xFF:02})"
        raise ImageError(what, where=one_line(path), fix="give an x86-64 kernel of Linux 3.8 or later")
    start = ((data[_SETUP_SECTORS] or 4) + 1) * _SECTOR
    body = data[start:]
    if len(body) <= _ENTRY_64:
        raise ImageError("cut off behind its setup", where=one_line(path), fix="copy it again")
    where = _field("<Q", data, _PREFERRED_ADDRESS)
    size = max(_field("<I", data, _INIT_SIZE), len(body))
    if not HIGH_MEMORY <= where < MEMORY_LIMIT:
        what = f"a preferred address of {where:#x}"
        raise ImageError(what, where=one_line(path), fix="give a kernel that runs below 1 GiB")
    zero_page = bytearray(PAGE)
    end = min(_MAGIC + data[0x201], _E820_TABLE)
    zero_page[_HEADER:end] = data[_HEADER:end]
    segment = Segment(where, body, len(body), readable=True, writable=True, executable=True, gva=where)
    return _Kernel(where + _ENTRY_64, LoadedImage((segment,), where + _ENTRY_64, Symbols()), zero_page, where + size)


def _vmlinux(path: Path, data: bytes, memory: int) -> _Kernel:
    from vmm.guest.elf import parse_elf  # noqa: PLC0415 - 60 ms that a bzImage need not pay

    image = parse_elf(data, one_line(path), memory)
    if image.entry is None or not image.holds(image.entry):
        raise ImageError("not entered at a physical address", where=one_line(path), fix="give an x86-64 vmlinux")
    zero_page = bytearray(PAGE)
    struct.pack_into("<H", zero_page, _BOOT_FLAG, 0xAA55)
    struct.pack_into("<4sH", zero_page, _MAGIC, b"HdrS", _OLDEST_VERSION)
    struct.pack_into("<I", zero_page, _INITRD_MAX, _DEFAULT_INITRD_MAX)
    struct.pack_into("<I", zero_page, _COMMAND_LINE_SIZE, _DEFAULT_COMMAND_LINE_SIZE)
    return _Kernel(image.entry, image, zero_page, max(segment.end for segment in image.segments))


def _field(form: str, data: bytes | bytearray, offset: int) -> int:
    (value,) = struct.unpack_from(form, data, offset)
    return int(value)


# What it is given


def _read_initrd(path: Path) -> bytes:
    return read_file(path, ELF_FILE_LIMIT, error=ImageError, fix="give the path of an initrd")


def _initrd(kernel: _Kernel, data: bytes, memory: int, path: Path | None) -> list[tuple[int, bytes]]:
    if not data:
        return []
    highest = min(memory, (_field("<I", kernel.zero_page, _INITRD_MAX) or _DEFAULT_INITRD_MAX) + 1)
    where = highest - len(data) & -PAGE
    if where < kernel.end:
        what = f"{len(data):#x} bytes do not fit between {kernel.end:#x} and {highest:#x}"
        raise ImageError(what, where=one_line(path), fix="give the guest more --memory")
    struct.pack_into("<II", kernel.zero_page, _RAMDISK, where, len(data))
    return [(where, data)]


def _command_line(kernel: _Kernel, text: str) -> list[tuple[int, bytes]]:
    limit = min(_field("<I", kernel.zero_page, _COMMAND_LINE_SIZE) or 255, PAGE - 1)
    data = encode_command_line(text)
    if len(data) > limit:
        fix = f"give at most {limit} bytes of text"
        raise OptionError(f"a command line of {len(data)} bytes", where="append", fix=fix)
    struct.pack_into("<I", kernel.zero_page, _COMMAND_LINE_POINTER, _COMMAND_LINE)
    return [(_COMMAND_LINE, data + b"\0")]


def _fill_zero_page(zero_page: bytearray, memory: int) -> None:
    zero_page[_TYPE_OF_LOADER] = _UNDEFINED_LOADER
    zero_page[_TYPE_OF_LOADER + 1] |= _LOADED_HIGH
    areas = memory_map(memory)
    zero_page[_E820_COUNT] = len(areas)
    for index, area in enumerate(areas):
        struct.pack_into("<QQI", zero_page, _E820_TABLE + 20 * index, area.start, area.length, area.type)


def _page_tables() -> bytes:
    """Four GiB that are mapped to themselves."""
    present_writable, large = 0x3, 0x83
    directories = range(_TABLES + 2 * PAGE, _TABLES + (2 + _IDENTITY_MAPPED) * PAGE, PAGE)
    top = struct.pack("<Q", _TABLES + PAGE | present_writable)
    pointers = b"".join(struct.pack("<Q", where | present_writable) for where in directories)
    pages = range(large, _IDENTITY_MAPPED << 30, 2 * MIB)
    return top.ljust(PAGE, b"\0") + pointers.ljust(PAGE, b"\0") + struct.pack(f"<{len(pages)}Q", *pages)


def _boot_state(entry: int, memory: int, writes: list[tuple[int, bytes]]) -> BootState:
    cpu = processor(entry, {"rsi": _ZERO_PAGE}, code=_CODE_64, data=_DATA)
    return BootState(
        mode="long",
        memory=memory,
        writes=tuple(writes),
        system=SystemArea(memory, b""),
        cr0=_CR0,
        cr3=_TABLES,
        cr4=_CR4_PAE,
        efer=_EFER,
        gdtr=(_GDT, len(_DESCRIPTORS) - 1),
        code_frames=(),
        cpus=(cpu,),
    )
