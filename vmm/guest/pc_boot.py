"""What the boot protocols of a PC have in common: the RAM as its firmware tells of it, the processor, the command line.

::

    0 ── usable ── 0x9f000 ── reserved ── 0x100000 ── usable ── the end of RAM

Boot protocols agree on the numbers of the types: those of INT 15h, function 0xe820.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vmm.cpu.state import Segment, SegmentName
from vmm.errors import OptionError
from vmm.guest.boot import CpuBoot
from vmm.guest.manifest import MEMORY_LIMIT

MIB: Final = 1 << 20
LOW_MEMORY_END: Final = 0x9F000
HIGH_MEMORY: Final = MIB
USABLE, RESERVED = 1, 2

_GRANULE: Final = 2 * MIB
_NULL: Final = Segment(0, 0, 0, 0)
_TASK: Final = Segment(0, 0, 0xFFFF, 0x8B)


@frozen(slots=True)
class MemoryArea:
    """``length`` bytes of guest-physical memory from ``start``, of one of the types above."""

    start: int
    length: int
    type: int


def memory_map(memory: int) -> tuple[MemoryArea, ...]:
    """What is where in a PC with ``memory`` bytes of RAM, in order, without gaps."""
    return (
        MemoryArea(0, LOW_MEMORY_END, USABLE),
        MemoryArea(LOW_MEMORY_END, HIGH_MEMORY - LOW_MEMORY_END, RESERVED),
        MemoryArea(HIGH_MEMORY, memory - HIGH_MEMORY, USABLE),
    )


def check_memory(memory: int) -> None:
    """Raise ``OptionError`` unless a PC can have ``memory`` bytes of RAM: a multiple of 2 MiB up to 1 GiB."""
    if memory % _GRANULE or not 0 < memory <= MEMORY_LIMIT:
        fix = f"give a multiple of 2 MiB up to {MEMORY_LIMIT // MIB}M"
        raise OptionError(f"{memory:#x} bytes of memory", where="memory", fix=fix)


def processor(rip: int, gprs: dict[str, int], *, code: Segment, data: Segment) -> CpuBoot:
    """The processor as a kernel finds it: interrupts off, no IDT, ``code`` in CS and ``data`` in all data segments."""
    names: tuple[SegmentName, ...] = ("ds", "es", "ss", "fs", "gs")
    return CpuBoot(
        rip=rip,
        gprs=gprs,
        xmm=(),
        rflags=2,
        mxcsr=0x1F80,
        fcw=0x37F,
        idtr=(0, 0),
        segments={"cs": code, **dict.fromkeys(names, data), "ldtr": _NULL, "tr": _TASK},
    )


def advise(end: int) -> str:
    """What to do for a kernel that needs memory up to ``end``."""
    return f"give it --memory {-(-end // _GRANULE) * 2}M or more"


def encode_command_line(text: str) -> bytes:
    """A command line as the kernel gets it, less the NUL at its end; raises ``OptionError`` for what is no text."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise OptionError("a lone surrogate in the command line", where="append", fix="give text") from None
    if b"\0" in data:
        raise OptionError("a NUL in the command line", where="append", fix="give text")
    return data
