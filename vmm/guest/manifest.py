"""``guest.toml``: a complete description of a run, schema "vmm-guest/1", read into frozen records.

The reference, with every key's type, range and default, is ``docs/manifest.md``. In short::

    schema, name, summary, wrong_of
    [image]    format, file, load (flat only), symbols (flat only: a file in the format of nm)
    [machine]  memory, mode
    [cpu]      entry (an address, or a symbol's name), cpl, iopl, registers, idt, rsp0
    [[vcpu]]   the same, for each further vCPU
    [schedule] seed, quantum: how the vCPUs take turns
    [paging]   identity, and [[paging.map]] gva, gpa, length, access, user
    [policy]   reads, writes, code, coherence, wx, tlb
    [ept]      profile, switches, [ept.capabilities] and [[ept.map]]: see ``vmm.guest.ept``
    [views]    views of the EPT: see ``vmm.guest.views``
    [console]  port: what the guest writes there is its printed output
    [input]    port, file: what the guest reads there
    [clock]    port, time: where it reads the time
    [ipi]      port: interprocessor interrupts, and the number of the vCPU that asks
    [workpiece] port, vector, lead, flaws: something for a guest to steer over
    [end]      port, value, halt
    [limits]   exits, seconds

Registers that are not given are zero, except rflags = 2, mxcsr = 0x1f80 and fcw = 0x37f. ``rip`` is not
among them: that is ``entry``. A long-mode guest that brings its own page tables gives ``registers.cr3`` and
no ``[paging]``; a long-mode guest with neither gets ``identity = "rwx"``: long mode has no unpaged form.
``iopl``, if given, replaces the IOPL field of ``registers.rflags``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from attrs import field, frozen

from vmm.ept import PROFILES, EptProfile
from vmm.guest.ept import EptMap
from vmm.guest.hidden import HiddenSpec
from vmm.guest.inputs import ClockSpec, InputSpec
from vmm.guest.views import PLAIN, ViewsSpec

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA: Final = "vmm-guest/1"
MANIFEST_NAME: Final = "guest.toml"
#: The script that belongs to a guest, beside its guest.toml.
SCRIPT_NAME: Final = "expect.script"
MEMORY_LIMIT: Final = 1 << 30
#: Linear addresses that the VMM keeps for GDT and TSS when it builds the page tables: (start, size).
RESERVED_LONG: Final = (0xFFFF_FE00_0000_0000, 1 << 21)
RESERVED_PROTECTED: Final = (0xFFC0_0000, 1 << 21)

Mode = Literal["long", "protected", "real"]
Format = Literal["flat", "elf64"]
Access = Literal["r", "rw", "rx", "rwx"]

MODES: Final[tuple[Mode, ...]] = ("long", "protected", "real")
FORMATS: Final[tuple[Format, ...]] = ("flat", "elf64")
ACCESSES: Final[tuple[Access, ...]] = ("r", "rw", "rx", "rwx")
GPRS: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
XMMS: Final = tuple(f"xmm{i}" for i in range(16))
REGISTERS: Final = (*GPRS, "rflags", "mxcsr", "fcw", "cr3", "fs_base", "gs_base", *XMMS)

#: Bits of RFLAGS that exist, less VM: a guest cannot start in virtual-8086 mode (SDM vol. 1, figure 3-8).
RFLAGS_VALID: Final = 0x3D_7FD7
MXCSR_VALID: Final = 0xFFFF

#: How many vCPUs a machine may have.
VCPUS_LIMIT: Final = 16
#: How many instructions a turn of a vCPU may have.
QUANTUM_LIMIT: Final = 1 << 20

MANIFEST_LIMIT: Final = 1 << 20


@frozen(slots=True)
class Image:
    """The guest's image file. ``load`` is the GPA of a flat image's first byte, None for ELF."""

    format: Format
    file: Path
    load: int | None = None
    symbols: Path | None = None


@frozen(slots=True)
class MachineSpec:
    """RAM from GPA 0 (bytes: a multiple of 4096, 4 KiB to 1 GiB), and the mode that the guest starts in."""

    memory: int
    mode: Mode


@frozen(slots=True)
class CpuSpec:
    """The first state of a vCPU. ``registers`` holds only those that were given.

    ``entry`` is a linear address, a symbol's name, or None for the ELF header's. ``iopl`` None leaves
    RFLAGS as given. ``idt`` None is an empty IDT (in real mode: the vector table at 0).
    """

    entry: int | str | None = None
    cpl: int = 0
    iopl: int | None = None
    registers: dict[str, int] = field(factory=dict)
    idt: int | None = None
    rsp0: int = 0


@frozen(slots=True)
class Schedule:
    """How several vCPUs take turns: turns of 1 to ``quantum`` instructions, drawn by ``seed`` (64 bits)."""

    seed: int = 0
    quantum: int = 64


@frozen(slots=True)
class Mapping:
    """``length`` bytes at linear address ``gva`` reach the frames at ``gpa``; all three are page-aligned."""

    gva: int
    gpa: int
    length: int
    access: Access
    user: bool = True


@frozen(slots=True)
class Paging:
    """The address space that the VMM builds. In ``maps`` later entries win, and all win over ``identity``."""

    identity: Access | None = None
    maps: tuple[Mapping, ...] = ()

    def effective(self, memory: int) -> tuple[Mapping, ...]:
        """All mappings in order, the identity of ``memory`` bytes of RAM as the first."""
        first = () if self.identity is None else (Mapping(0, 0, memory, self.identity),)
        return first + self.maps

    def resolve(self, linear: int, memory: int) -> tuple[int, Mapping] | None:
        """The GPA that ``linear`` reaches, and the mapping that decides; None where nothing is mapped."""
        for mapping in reversed(self.effective(memory)):
            if mapping.gva <= linear < mapping.gva + mapping.length:
                return mapping.gpa + linear - mapping.gva, mapping
        return None


@frozen(slots=True)
class Policy:
    """How the trap behaves; ``docs/manifest.md`` has the meaning of each word."""

    reads: Literal["step", "grant", "adaptive"] = "step"
    writes: Literal["step", "window", "adaptive"] = "step"
    code: Literal["load", "fetch", "seal"] = "fetch"
    coherence: Literal["coherent", "serialised", "explicit"] = "coherent"
    wx: Literal["off", "fault", "stop"] = "off"
    tlb: Literal["loose", "strict"] = "loose"

    @property
    def loads_code(self) -> bool:
        """Whether frames of executable segments are code from the start."""
        return self.code != "fetch" or self.wx != "off"


@frozen(slots=True)
class Console:
    """The port whose bytes are the guest's printed output."""

    port: int = 0xE9


@frozen(slots=True)
class Ipi:
    """The port by which vCPUs interrupt each other; None if there is none."""

    port: int | None = None


@frozen(slots=True)
class WorkpieceSpec:
    """Flaws at (x, y) that a sensor finds ``lead`` positions ahead, raising the interrupt ``vector``."""

    port: int
    vector: int
    lead: int
    flaws: tuple[tuple[int, int], ...]


@frozen(slots=True)
class End:
    """What ends the run as expected: a byte on ``port`` (if given, ``value``), HLT with interrupts off."""

    port: int | None = 0xF4
    value: int | None = None
    halt: bool = False


@frozen(slots=True)
class Limits:
    """Budgets after which the run is cut off: VM exits, and seconds of wall-clock time as a safety net."""

    exits: int = 1_000_000
    seconds: float = 300.0


@frozen(slots=True)
class Manifest:
    """A whole ``guest.toml``. ``paging`` is None where the VMM builds no page tables.

    ``wrong_of`` names the guest in the folder beside this one's that this is the wrong version of: it is held
    against that guest's script, and fails. Empty for a right one. ``others`` are the vCPUs besides the first, ``cpu``.
    """

    path: Path
    name: str
    image: Image
    machine: MachineSpec
    cpu: CpuSpec
    paging: Paging | None
    summary: str = ""
    policy: Policy = Policy()
    ept: EptProfile = PROFILES["default"]
    views: ViewsSpec = PLAIN
    ept_maps: tuple[EptMap, ...] = ()
    console: Console = Console()
    input: InputSpec | None = None
    clock: ClockSpec | None = None
    end: End = End()
    limits: Limits = Limits()
    others: tuple[CpuSpec, ...] = ()
    schedule: Schedule = Schedule()
    ipi: Ipi = Ipi()
    workpiece: WorkpieceSpec | None = None
    wrong_of: str = ""
    hidden: tuple[HiddenSpec, ...] = ()

    @property
    def is_file(self) -> bool:
        """Whether it is a guest.toml, and not what an image without one is given."""
        return self.path != self.image.file

    @property
    def has_page_tables(self) -> bool:
        """Whether the guest starts with paging on."""
        return has_page_tables(self.machine, self.paging)

    @property
    def cpus(self) -> tuple[CpuSpec, ...]:
        """All vCPUs, by number."""
        return (self.cpu, *self.others)

    @property
    def own_script(self) -> Path:
        """Where the script is that belongs to the guest, whether or not there is one."""
        folder = self.path.parent
        return (folder.parent / self.wrong_of if self.wrong_of else folder) / SCRIPT_NAME


def has_page_tables(machine: MachineSpec, paging: Paging | None) -> bool:
    """Whether a guest starts with paging on."""
    return machine.mode == "long" or paging is not None
