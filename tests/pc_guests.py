"""Tiny kernels for the PC: bzImages made from assembly text, entered by the 64-bit boot protocol."""

from __future__ import annotations

import struct
from pathlib import Path

import tiny

from vmm.guest.linux import load_linux
from vmm.machine import Machine, RunOptions

#: Where the code of a tiny kernel starts, and addresses that it may use.
ENTRY = 0x1000200
IDT = 0x100000
STACK = 0x120000
DATA = 0x130000

#: The first vectors of the two interrupt controllers once ``PIC`` has run.
MASTER, SLAVE = 0x20, 0x28
PIC = "".join(
    f"mov al, {value}; out {port}, al;"
    for port, value in (
        (0x20, 0x11), (0x21, MASTER), (0x21, 4), (0x21, 1), (0xA0, 0x11), (0xA1, SLAVE), (0xA1, 2), (0xA1, 1),
    )
)  # fmt: skip
EOI = "mov al, 0x20; out 0x20, al;"
END = "mov al, 0; out 0xf4, al;"


def timer(count: int, mode: int = 2) -> str:
    """Counter 0 with a count."""
    bytes_out = ((0x43, 0x30 | mode << 1), (0x40, count & 0xFF), (0x40, count >> 8))
    return "".join(f"mov al, {value}; out {port}, al;" for port, value in bytes_out)


def prologue(vector: int) -> str:
    """A stack, an IDT whose ``vector`` leads to the label ``handler``, PICs that let nothing through but its IRQ."""
    gate = IDT + 16 * vector
    irq = vector - MASTER
    return f"""
        mov esp, {STACK}
        lea rax, [rip + handler]; mov edi, {gate}
        mov [rdi], ax; mov word ptr [rdi + 2], 0x10; mov word ptr [rdi + 4], 0x8e00
        shr rax, 16; mov [rdi + 6], ax; shr rax, 16; mov [rdi + 8], eax; mov dword ptr [rdi + 12], 0
        mov edi, {DATA}; mov word ptr [rdi], 0xfff; mov qword ptr [rdi + 2], {IDT}; lidt [rdi]
        {PIC}
        mov al, {~(1 << irq | (4 if irq > 7 else 0)) & 0xFF if irq < 8 else 0xFB}; out 0x21, al
        mov al, {0xFF if irq < 8 else ~(1 << irq - 8) & 0xFF}; out 0xa1, al
    """


def bz_image(code: bytes, *, version: int = 0x20F, flags: int = 1, where: int = ENTRY - 0x200, size: int = 0) -> bytes:
    """A file with one sector of setup behind the boot sector, and ``code`` at the 64-bit entry."""
    setup = bytearray(1024)
    setup[0x1F1] = 1
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x201] = 0x66
    struct.pack_into("<4sH", setup, 0x202, b"HdrS", version)
    struct.pack_into("<I", setup, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<H", setup, 0x236, flags)
    struct.pack_into("<I", setup, 0x238, 2047)
    struct.pack_into("<Q", setup, 0x258, where)
    struct.pack_into("<I", setup, 0x260, size)
    return bytes(setup) + b"\xf4" * 0x200 + code


def kernel(folder: Path, source: str) -> Path:
    """The file of a tiny kernel."""
    path = folder / "kernel"
    path.write_bytes(bz_image(tiny.assemble(source, ENTRY)))
    return path


def build(folder: Path, source: str, *, options: RunOptions | None = None, acts: bool = False, **rest) -> tiny.Tiny:
    """A PC that runs a tiny kernel, with all that it reports kept."""
    rest.setdefault("memory", 32 << 20)
    rest.setdefault("seconds", 20.0)
    guest = load_linux(kernel(folder, source), **rest)
    return tiny.watch(Machine(guest, options or RunOptions(check=True)), acts=acts)
