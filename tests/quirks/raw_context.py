"""The bytes of a ``UcContext`` (release 2.1.4): a small header, then QEMU's CPUX86State."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from unicorn.unicorn_py3.unicorn import UcContext

if TYPE_CHECKING:
    from .bare_unicorn import Bare

SIZE: Final = 5608
ENV: Final = 0x28

# Offsets from the start of the context, in bytes.
GPRS: Final = ENV  # rax rcx rdx rbx rsp rbp rsi rdi r8-r15, u64 each
RIP: Final = ENV + 0x80
EFLAGS: Final = ENV + 0x88  # between runs complete; inside a hook without the arithmetic flags
HFLAGS: Final = ENV + 0xB0  # bits 1:0 CPL, bit 3 interrupt shadow
# es cs ss ds fs gs ldt tr gdt idt: selector u32, padding, base u64, limit u32, flags u32
SEGMENTS: Final = ENV + 0xB8
SEGMENT_SIZE: Final = 24
CR0: Final = ENV + 0x1A8  # cr0-cr4, u64 each
MXCSR: Final = ENV + 0x330
FCW: Final = ENV + 0x262
ERROR_CODE: Final = ENV + 0x1508
EXCEPTION_IS_INT: Final = ENV + 0x150C
EXCEPTION_NEXT_EIP: Final = ENV + 0x1510
DR0: Final = ENV + 0x1518  # dr0-dr7, u64 each
OLD_EXCEPTION: Final = ENV + 0x1578  # the vector that a second exception would turn into #DF, -1 for none
NONE: Final = 0xFFFF_FFFF


def raw(b: Bare) -> bytes:
    """The engine's state."""
    return bytes(b.uc.context_save())


def field(state: bytes, offset: int, size: int = 4) -> int:
    """A little-endian number in it."""
    return int.from_bytes(state[offset : offset + size], "little")


def poke(b: Bare, offset: int, value: int, size: int = 4) -> None:
    """Change a number in the engine's state."""
    saved = b.uc.context_save()
    state, length, arch, mode = saved.__getstate__()
    changed = bytearray(state)
    changed[offset : offset + size] = value.to_bytes(size, "little")
    forged = UcContext.__new__(UcContext)
    forged.__setstate__((bytes(changed), length, arch, mode))
    b.uc.context_restore(forged)
