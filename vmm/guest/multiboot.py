"""A PC that enters a Multiboot image, version 1 (Multiboot Specification 0.6.96).

What the kernel finds when it is entered::

    image       where its header or its program headers want it
    modules     each on a page of its own, above the image and above 1 MiB
    0x00400     words of the BIOS data area, unless the image lies there: COM1, end of low memory
    0x9f000     GDT, boot information and all that it points to: one page, outside of the RAM that it tells of
    0xf0000     ACPI tables, unless the image lies there

    EAX 0x2badb002   EBX the address of the boot information   CS 0x08, other segments 0x10: flat, 4 GiB
    CR0.PE 1         paging and interrupts off                 all other registers 0, no IDT, no stack

The specification lets the kernel rely on no GDT, so that this one may be there; QEMU's has the same selectors.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from vmm.cpu.state import Segment as SegmentRegister
from vmm.devices.uart import COM1
from vmm.errors import ImageError, OptionError
from vmm.guest import acpi
from vmm.guest.boot import BootState, SystemArea
from vmm.guest.files import one_line, read_file
from vmm.guest.image import ELF_FILE_LIMIT, PAGE, LoadedImage
from vmm.guest.loader import BootProtocol, Guest
from vmm.guest.manifest import CpuSpec, End, Image, Limits, MachineSpec, Manifest, Policy
from vmm.guest.multiboot_image import INFORMATION, read_multiboot_image
from vmm.guest.pc_boot import (
    HIGH_MEMORY,
    LOW_MEMORY_END,
    MIB,
    advise,
    check_memory,
    encode_command_line,
    memory_map,
    processor,
)

#: What a trace calls it.
PROTOCOL: Final = "multiboot"
#: Bytes of RAM that an image gets unless told otherwise.
DEFAULT_MEMORY: Final = 64 * MIB
#: EAX at entry: a Multiboot loader was here.
LOADER_MAGIC: Final = 0x2BADB002

# The BIOS data area: ports of COM1 to COM4; at 0x40e the segment above low memory, at 0x413 its size in KiB.
_BIOS_DATA: Final = 0x400
_BIOS_DATA_WORDS: Final = struct.pack("<4H 6x H 3x H", COM1, 0, 0, 0, LOW_MEMORY_END >> 4, LOW_MEMORY_END >> 10)
_LOADER_NAME: Final = b"vmm\0"

# The boot information (3.3): flags, memory in KiB, boot device, command line, modules, symbols (4 words), memory map,
# drives, configuration table, name of the loader; behind it APM, VBE and framebuffer, which are not there.
_LAYOUT: Final = struct.Struct("<4I I2I 16x 2I 12x I")
_LAYOUT_SIZE: Final = 116
_HAS_MEMORY, _HAS_COMMAND_LINE, _HAS_MODULES, _HAS_MEMORY_MAP, _HAS_LOADER_NAME = (1 << n for n in (0, 2, 3, 6, 9))
_FLAGS: Final = _HAS_MEMORY | _HAS_COMMAND_LINE | _HAS_MODULES | _HAS_MEMORY_MAP | _HAS_LOADER_NAME
_MODULE: Final = struct.Struct("<4I")
# An entry of the memory map: its size without this word, base, length, type.
_MEMORY_AREA: Final = struct.Struct("<IQQI")

_CR0: Final = 1 << 4 | 1 << 0  # ET PE
_CODE: Final = SegmentRegister(0x08, 0, 0xFFFF_FFFF, 0xC09B)
_DATA: Final = SegmentRegister(0x10, 0, 0xFFFF_FFFF, 0xC093)
_DESCRIPTORS: Final = struct.pack("<QQQ", 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


@frozen(slots=True)
class _Module:
    """A module at ``start``; ``name`` is the string that goes with it."""

    start: int
    data: bytes
    name: bytes


def load_multiboot(
    kernel: Path,
    *,
    modules: Sequence[Path] = (),
    command_line: str = "",
    memory: int = DEFAULT_MEMORY,
    policy: Policy | None = None,
    seconds: float = 300.0,
    names: Sequence[str] | None = None,
    apic: bool = True,
) -> Guest:
    """A PC that enters a Multiboot image; raises ``ImageError`` for its files, ``OptionError`` for the rest.

    The kernel's command line is its name and then ``command_line``; the string of a module is its name. ``names`` are
    these, the kernel's first, by default those of the files. ``memory`` is the size of its RAM in bytes, a multiple of
    2 MiB up to 1 GiB. The run ends when the guest halts with interrupts off, resets the machine, or writes to port
    0xf4. With ``apic`` it has a local APIC, an I/O APIC, and, unless the image lies there, the ACPI tables that tell of
    them.
    """
    check_memory(memory)
    data = read_file(kernel, ELF_FILE_LIMIT, error=ImageError, fix="give the path of a Multiboot image")
    image = read_multiboot_image(data, one_line(kernel), memory)
    assert image.entry is not None
    name, *strings = [path.name for path in (kernel, *modules)] if names is None else names
    loaded = _load_modules(modules, strings, image, memory)
    words = f"{name} {command_line}" if command_line else name
    information, page = _information(encode_command_line(words), loaded, memory)
    writes = _writes(image, loaded, page, {acpi.PLACE: acpi.tables()} if apic else {})
    return Guest(
        _manifest(kernel, image.entry, memory, policy or Policy(), seconds),
        image,
        image.entry,
        boot=_boot_state(image.entry, memory, information, writes),
        is_pc=True,
        protocol=BootProtocol(PROTOCOL, command_line, tuple(modules), (name, *strings), apic=apic),
    )


def _manifest(kernel: Path, entry: int, memory: int, policy: Policy, seconds: float) -> Manifest:
    return Manifest(
        path=kernel,
        name=one_line(kernel.name),
        image=Image("flat", kernel, 0),
        machine=MachineSpec(memory, "protected"),
        cpu=CpuSpec(entry),
        paging=None,
        summary="Multiboot image",
        policy=policy,
        end=End(halt=True),
        limits=Limits(exits=1 << 62, seconds=seconds),
    )


def _writes(
    image: LoadedImage, modules: Sequence[_Module], page: bytes, tables: Mapping[int, bytes]
) -> list[tuple[int, bytes]]:
    """All that is in memory, as (GPA, bytes)."""
    writes = [(segment.gpa, segment.data) for segment in image.segments if segment.data]
    writes += [(module.start, module.data) for module in modules if module.data]
    writes.append((INFORMATION, page))
    firmware = {_BIOS_DATA: _BIOS_DATA_WORDS, **tables}
    return writes + [(gpa, data) for gpa, data in firmware.items() if image.spares(gpa, len(data))]


def _load_modules(paths: Sequence[Path], names: Sequence[str], image: LoadedImage, memory: int) -> list[_Module]:
    """Put modules one after the other, each on pages of its own, above the image and above 1 MiB."""
    modules, end = [], max(HIGH_MEMORY, *(segment.end for segment in image.segments))
    for path, name in zip(paths, names, strict=True):
        data = read_file(path, ELF_FILE_LIMIT, error=ImageError, fix="give the path of a module")
        start = -(-end // PAGE) * PAGE
        end = start + len(data)
        if end > memory:
            what = f"{len(data):#x} bytes at {start:#x} reach out of RAM, which ends at {memory:#x}"
            raise ImageError(what, where=one_line(path), fix=advise(end))
        modules.append(_Module(start, data, encode_command_line(name)))
    return modules


def _information(command_line: bytes, modules: Sequence[_Module], memory: int) -> tuple[int, bytes]:
    """The address of the boot information, and the page with the GDT that it is in."""
    page = bytearray(_DESCRIPTORS)

    def put(data: bytes) -> int:
        at = len(page)
        page.extend(data + bytes(-len(data) % 4))
        return INFORMATION + at

    address = put(bytes(_LAYOUT_SIZE))
    areas = b"".join(
        _MEMORY_AREA.pack(_MEMORY_AREA.size - 4, area.start, area.length, area.type) for area in memory_map(memory)
    )
    table = b"".join(_MODULE.pack(m.start, m.start + len(m.data), put(m.name + b"\0"), 0) for m in modules)
    fields = (
        (_FLAGS, LOW_MEMORY_END >> 10, memory - HIGH_MEMORY >> 10, 0),
        (put(command_line + b"\0"), len(modules), put(table)),
        (len(areas), put(areas), put(_LOADER_NAME)),
    )
    _LAYOUT.pack_into(page, address - INFORMATION, *(value for group in fields for value in group))
    if len(page) > PAGE:
        what = f"{len(page)} bytes of boot information, with the command line and {len(modules)} modules"
        raise OptionError(what, where="append", fix=f"shorten it: there is room for {PAGE}")
    return address, bytes(page)


def _boot_state(entry: int, memory: int, information: int, writes: list[tuple[int, bytes]]) -> BootState:
    cpu = processor(entry, {"rax": LOADER_MAGIC, "rbx": information}, code=_CODE, data=_DATA)
    return BootState(
        mode="protected",
        memory=memory,
        writes=tuple(writes),
        system=SystemArea(memory, b""),
        cr0=_CR0,
        cr3=0,
        cr4=0,
        efer=0,
        gdtr=(INFORMATION, len(_DESCRIPTORS) - 1),
        code_frames=(),
        cpus=(cpu,),
    )
