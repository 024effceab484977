"""The initial machine of a guest: what is in memory and in the registers before the first instruction.

Page tables, GDT and TSS are the VMM's and lie in the *system area* above the guest's RAM, from the next
multiple of 2 MiB on, so that RAM is the guest's alone::

    GPA   0 ────────────── memory ┄┄ round up to 2 MiB ──┬─────────┬──────┬─────────────
          RAM: the image, zeros elsewhere                │ GDT     │ TSS  │ page tables
                                                         │ +0      │ +0x400 │ +0x1000
    GVA                                                  └ one page ──────┘ not mapped

===========================  ===========================  ==========================================
mode                         paging                       GDT and TSS are at linear
===========================  ===========================  ==========================================
long                         4-level, built by the VMM    0xffff_fe00_0000_0000, supervisor RW-NX
long, ``registers.cr3``      the guest's own tables       their GPA: the guest's tables must map it,
                                                          or the guest loads a GDT of its own before
                                                          it needs a descriptor or a ring-0 stack
protected, ``[paging]``      PAE, built by the VMM        0xffc0_0000, supervisor RW-NX
protected                    off                          their GPA
real                         off                          there is no system area
===========================  ===========================  ==========================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.guest import descriptors
from vmm.guest.manifest import GPRS, RESERVED_LONG, RESERVED_PROTECTED, XMMS, Mapping, Mode
from vmm.guest.pagetables import FOUR_LEVEL, PAE, PageTables

if TYPE_CHECKING:
    from vmm.cpu.state import Segment, SegmentName
    from vmm.guest.loader import Guest
    from vmm.guest.manifest import CpuSpec, Manifest, Paging

PAGE: Final = 4096
SYSTEM_ALIGNMENT: Final = 1 << 21
TSS_OFFSET: Final = 0x400
#: From the TSS of one vCPU to that of the next.
TSS_DISTANCE: Final = 0x80

_RFLAGS_FIXED: Final = 1 << 1
_IOPL_SHIFT: Final = 12

_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_WP, _CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
_CR0_ALWAYS: Final = _CR0_MP | _CR0_ET | _CR0_NE
_CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
_EFER_SCE, _EFER_LME, _EFER_LMA, _EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11

_MXCSR_DEFAULT: Final = 0x1F80
_FCW_DEFAULT: Final = 0x37F
_IDT_LIMITS: Final[dict[Mode, int]] = {"long": 0xFFF, "protected": 0x7FF, "real": 0x3FF}


@frozen(slots=True)
class SystemArea:
    """The VMM's own part of guest-physical memory: ``data`` at ``gpa``, whole pages, none in real mode."""

    gpa: int
    data: bytes


@frozen(slots=True)
class CpuBoot:
    """The registers that a vCPU starts with, besides the control registers.

    ``rip`` is the offset in CS (in real mode not the linear address), ``idtr`` is (linear base, limit).
    """

    rip: int
    gprs: dict[str, int]
    xmm: tuple[int, ...]
    rflags: int
    mxcsr: int
    fcw: int
    idtr: tuple[int, int]
    segments: dict[SegmentName, Segment]


@frozen(slots=True)
class BootState:
    """Everything that the first instruction can see. Integers are plain, sizes are bytes.

    ``writes`` are (GPA, bytes) for RAM, which is zero elsewhere. ``gdtr`` is (linear base, limit). ``code_frames``
    are the GPAs of the frames that are code from the start. ``cpus`` has an entry for each vCPU; control registers,
    GDT and page tables are the same for all of them.
    """

    mode: Mode
    memory: int
    writes: tuple[tuple[int, bytes], ...]
    system: SystemArea
    cr0: int
    cr3: int
    cr4: int
    efer: int
    gdtr: tuple[int, int]
    code_frames: tuple[int, ...]
    cpus: tuple[CpuBoot, ...]


def build(guest: Guest) -> BootState:
    """The initial machine of a guest that ``load_guest`` has checked; always the same for the same guest."""
    manifest = guest.manifest
    mode, registers = manifest.machine.mode, manifest.cpu.registers
    area = _Area(manifest)
    return BootState(
        mode=mode,
        memory=manifest.machine.memory,
        writes=tuple((segment.gpa, segment.data) for segment in guest.image.segments if segment.data),
        system=SystemArea(area.gpa, area.data),
        cr0=_cr0(mode, paging=bool(area.cr3) or "cr3" in registers),
        cr3=registers.get("cr3", area.cr3),
        cr4=_CR4_OSFXSR | _CR4_OSXMMEXCPT | (_CR4_PAE if mode == "long" or area.cr3 else 0),
        efer=_efer(mode, paging=bool(area.cr3)),
        gdtr=area.gdtr,
        code_frames=guest.image.code_frames() if manifest.policy.loads_code else (),
        cpus=tuple(_cpu(guest, number, area.tss(number)) for number in range(len(manifest.cpus))),
    )


def _cpu(guest: Guest, number: int, tss: int) -> CpuBoot:
    """The first state of one vCPU, whose TSS is at the linear address ``tss``."""
    mode, spec, entry = guest.manifest.machine.mode, guest.manifest.cpus[number], guest.entries[number]
    registers = spec.registers
    code_base = entry & ~0xF if mode == "real" and entry > 0xFFFF else 0
    return CpuBoot(
        rip=entry - code_base,
        gprs={name: registers.get(name, 0) for name in GPRS},
        xmm=tuple(registers.get(name, 0) for name in XMMS),
        rflags=_rflags(spec),
        mxcsr=registers.get("mxcsr", _MXCSR_DEFAULT),
        fcw=registers.get("fcw", _FCW_DEFAULT),
        idtr=_idtr(mode, spec),
        segments=_segments(mode, spec, code_base, number, tss),
    )


class _Area:
    """The system area of one guest: where it is, what is in it. ``cr3`` 0: no page tables of the VMM's."""

    def __init__(self, manifest: Manifest) -> None:
        mode = manifest.machine.mode
        self.gpa = -(-manifest.machine.memory // SYSTEM_ALIGNMENT) * SYSTEM_ALIGNMENT
        self.data = b""
        self.linear = self.gpa
        self.gdtr = (0, 0xFFFF)
        self.cr3 = 0
        if mode == "real":
            return
        if manifest.paging is not None:
            self.linear = (RESERVED_LONG if mode == "long" else RESERVED_PROTECTED)[0]
            self.cr3 = self.gpa + PAGE
        stacks = [cpu.rsp0 for cpu in manifest.cpus]
        gdt = descriptors.global_descriptor_table(mode, manifest.cpu.cpl, list(map(self.tss, range(len(stacks)))))
        segments = (descriptors.task_state_segment(mode, stack).ljust(TSS_DISTANCE, b"\0") for stack in stacks)
        page = gdt.ljust(TSS_OFFSET, b"\0") + b"".join(segments)
        self.data = page.ljust(PAGE, b"\0") + self._tables(manifest.paging, manifest)
        self.gdtr = (self.linear, len(gdt) - 1)

    def tss(self, number: int) -> int:
        """The linear address of the TSS of a vCPU."""
        return self.linear + TSS_OFFSET + number * TSS_DISTANCE

    def _tables(self, paging: Paging | None, manifest: Manifest) -> bytes:
        if paging is None:
            return b""
        tables = PageTables(self.cr3, FOUR_LEVEL if manifest.machine.mode == "long" else PAE)
        for mapping in paging.effective(manifest.machine.memory):
            tables.map(mapping)
        tables.map(Mapping(self.linear, self.gpa, PAGE, "rw", user=False))
        return tables.to_bytes()


def _rflags(cpu: CpuSpec) -> int:
    rflags = cpu.registers.get("rflags", 0) | _RFLAGS_FIXED
    if cpu.iopl is None:
        return rflags
    return rflags & ~(3 << _IOPL_SHIFT) | cpu.iopl << _IOPL_SHIFT


def _cr0(mode: Mode, *, paging: bool) -> int:
    protected = 0 if mode == "real" else _CR0_PE | _CR0_WP
    return _CR0_ALWAYS | protected | (_CR0_PG if paging else 0)


def _efer(mode: Mode, *, paging: bool) -> int:
    if mode == "long":
        return _EFER_SCE | _EFER_LME | _EFER_LMA | _EFER_NXE
    return _EFER_NXE if paging else 0


def _idtr(mode: Mode, cpu: CpuSpec) -> tuple[int, int]:
    if cpu.idt is None and mode != "real":
        return 0, 0
    return cpu.idt or 0, _IDT_LIMITS[mode]


def _segments(mode: Mode, cpu: CpuSpec, code_base: int, number: int, tss: int) -> dict[SegmentName, Segment]:
    registers = cpu.registers
    bases: dict[SegmentName, int] = {"fs": registers.get("fs_base", 0), "gs": registers.get("gs_base", 0)}
    if mode == "real":
        return descriptors.real_segments(code_base, bases)
    return descriptors.segments(mode, cpu.cpl, descriptors.task_register(number, cpu.cpl, tss), bases)
