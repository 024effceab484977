"""Segment registers, GDT and TSS as a guest finds them.

The GDT, the same in long and protected mode::

    0x08  ring-0 code      0x1b  ring-3 data     0x28  TSS (16 bytes in long mode, 8 in protected mode)
    0x10  ring-0 data      0x23  ring-3 code     0x38, 0x40  code and data of ring 1 or 2, if cpl says so

TSS descriptors of further vCPUs follow, 16 bytes each.
The order fits SYSCALL and SYSRET with IA32_STAR = 0x0010_0008 in its upper half. Descriptors are marked
accessed, and the TSS busy, from the start: the processor never writes to the table.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vmm.cpu.state import Segment, SegmentName

if TYPE_CHECKING:
    from vmm.guest.manifest import Mode

TSS_SELECTOR: Final = 0x28
TSS_SIZE: Final = 104
_GDT_SIZE: Final = 0x38
_DATA_SELECTORS: Final[tuple[SegmentName, ...]] = ("ss", "ds", "es", "fs", "gs")

# Access rights in the VMCS format: G 15, D/B 14, L 13, P 7, DPL 6:5, S 4, type 3:0.
_CODE64: Final = 0xA09B
_CODE32: Final = 0xC09B
_DATA: Final = 0xC093
_REAL_CODE: Final = 0x009B
_REAL_DATA: Final = 0x0093
_TSS_BUSY: Final = 0x008B
_LDT: Final = 0x0082
_FLAT_LIMIT: Final = 0xFFFF_FFFF


def task_register(number: int, cpl: int, tss: int) -> Segment:
    """TR of a vCPU whose TSS is at the linear address ``tss``; ``cpl`` is the first vCPU's."""
    others = _GDT_SIZE + (16 if cpl in (1, 2) else 0)
    selector = others + 16 * (number - 1) if number else TSS_SELECTOR
    return Segment(selector, tss, TSS_SIZE - 1, _TSS_BUSY)


def segments(mode: Mode, cpl: int, tss: Segment, bases: dict[SegmentName, int]) -> dict[SegmentName, Segment]:
    """The segment registers of long or protected mode at ``cpl``; ``tss`` is the task register.

    ``bases`` gives those of FS and GS. In long mode these two hold the null selector; their bases count all
    the same.
    """
    code, data = _selectors(cpl)
    dpl = cpl << 5
    long = mode == "long"
    found: dict[SegmentName, Segment] = {
        "cs": Segment(code, 0, _FLAT_LIMIT, (_CODE64 if long else _CODE32) | dpl),
        "tr": tss,
        "ldtr": Segment(0, 0, 0, _LDT),
    }
    for name in _DATA_SELECTORS:
        selector = 0 if long and name in ("fs", "gs") else data
        found[name] = Segment(selector, bases.get(name, 0), _FLAT_LIMIT, _DATA | dpl)
    return found


def real_segments(code_base: int, bases: dict[SegmentName, int]) -> dict[SegmentName, Segment]:
    """The segment registers of real mode: 64 KiB each, base = 16 x selector (SDM vol. 3, 21.1.1)."""
    found: dict[SegmentName, Segment] = {
        "cs": Segment(code_base >> 4, code_base, 0xFFFF, _REAL_CODE),
        "tr": Segment(0, 0, 0xFFFF, _TSS_BUSY),
        "ldtr": Segment(0, 0, 0xFFFF, _LDT),
    }
    for name in _DATA_SELECTORS:
        base = bases.get(name, 0)
        found[name] = Segment(base >> 4, base, 0xFFFF, _REAL_DATA)
    return found


def global_descriptor_table(mode: Mode, cpl: int, tasks: list[int]) -> bytes:
    """The GDT for a guest that starts at ``cpl``; ``tasks`` are the linear addresses of the vCPUs' TSSs."""
    code = _CODE64 if mode == "long" else _CODE32
    table = [bytes(8)]
    for dpl, rights in ((0, code), (0, _DATA), (3, _DATA), (3, code)):
        table.append(_descriptor(0, _FLAT_LIMIT, rights | dpl << 5))
    table += _task_descriptor(tasks[0])
    if cpl in (1, 2):
        table += [_descriptor(0, _FLAT_LIMIT, rights | cpl << 5) for rights in (code, _DATA)]
    for tss in tasks[1:]:
        table += _task_descriptor(tss)
    return b"".join(table)


def _task_descriptor(tss: int) -> list[bytes]:
    """The 16 bytes of a TSS descriptor; the upper half is a null descriptor in protected mode."""
    return [_descriptor(tss, TSS_SIZE - 1, _TSS_BUSY), struct.pack("<Q", tss >> 32)]


def task_state_segment(mode: Mode, rsp0: int) -> bytes:
    """A TSS whose ring-0 stack is ``rsp0``, without an I/O bitmap (SDM vol. 3, figures 8-2 and 8-11).

    ::

        long mode   4: RSP0 (8 bytes)            102: I/O map base (2 bytes)
        protected   4: ESP0 (4)   8: SS0 (2)     102: I/O map base (2 bytes)
    """
    tss = bytearray(TSS_SIZE)
    if mode == "long":
        struct.pack_into("<Q", tss, 4, rsp0)
    else:
        struct.pack_into("<IH", tss, 4, rsp0, 0x10)
    struct.pack_into("<H", tss, 102, TSS_SIZE)
    return bytes(tss)


def _selectors(cpl: int) -> tuple[int, int]:
    """The selectors of code and data at ``cpl``."""
    if cpl in (1, 2):
        return _GDT_SIZE | cpl, _GDT_SIZE + 8 | cpl
    return (0x23, 0x1B) if cpl else (0x08, 0x10)


def _descriptor(base: int, limit: int, rights: int) -> bytes:
    """The 8 bytes of a segment descriptor (SDM vol. 3, figure 3-8).

    ::

        63:56   55:52      51:48   47:40        39:16   15:0
        base    G D L AVL  limit   P DPL S type base    limit
        31:24              19:16                23:0    15:0
    """
    scaled = limit >> 12 if rights & 0x8000 else limit
    low = base & 0xFF_FFFF
    value = scaled & 0xFFFF | low << 16 | (rights & 0xFF) << 40
    value |= (scaled >> 16 & 0xF) << 48 | (rights >> 12 & 0xF) << 52 | (base >> 24 & 0xFF) << 56
    return struct.pack("<Q", value)
