"""Machines for tests: made in memory from assembly text and mappings, with everything they report kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import keystone
from attrs import define, evolve, field

from vmm.exits import EptViolation, Exit, ExitReason
from vmm.guest.image import LoadedImage, Segment
from vmm.guest.loader import Guest
from vmm.guest.manifest import CpuSpec, Image, Ipi, Limits, MachineSpec, Manifest, Paging, Policy, Schedule
from vmm.guest.manifest import Mapping as PageMapping
from vmm.guest.symbols import Symbols
from vmm.machine import Machine, RunOptions
from vmm.records import BlockEvent, End, FrameEvent, Modification, Record

PAGE = 0x1000
#: Where the code of a tiny guest starts, its data page, and the end of its stack (one page).
CODE = 0x10000
DATA = 0x40000
STACK = 0x50000
MEMORY = 0x100000
#: OUT to this port ends a run.
END_PORT = 0xF4
#: Ends a run with the value in AL.
END = "out 0xf4, al\n"

STRICT = RunOptions(check=True, audit=True, block_events=True)

_engines: dict[int, keystone.Ks] = {}
_MODES = {64: keystone.KS_MODE_64, 32: keystone.KS_MODE_32, 16: keystone.KS_MODE_16}


@lru_cache(maxsize=4096)
def assemble(text: str, address: int = CODE, bits: int = 64) -> bytes:
    """Intel-syntax instructions, one a line (``;`` separates, too), as they are at an address."""
    if bits not in _engines:
        _engines[bits] = keystone.Ks(keystone.KS_ARCH_X86, _MODES[bits])
    code, _ = _engines[bits].asm(text, address, as_bytes=True)
    return code or b""


def map_page(gva: int, gpa: int, access: str = "rwx", *, pages: int = 1, user: bool = True) -> PageMapping:
    return PageMapping(gva, gpa, pages * PAGE, access, user=user)  # type: ignore[arg-type]


#: What every tiny guest has: its code page, data and stack.
BASICS = (map_page(CODE, CODE), map_page(DATA, DATA, "rw"), map_page(STACK - PAGE, STACK - PAGE, "rw"))


@define(slots=True)
class Tiny:
    """A machine and all that it reports."""

    machine: Machine
    records: list[Record] = field(factory=list)
    end: End | None = None

    def run(self) -> End:
        self.end = self.machine.run()
        return self.end

    def of(self, *kinds: type) -> list:
        """The records of some types, in order."""
        return [record for record in self.records if isinstance(record, kinds)]

    @property
    def modifications(self) -> list[Modification]:
        return self.of(Modification)

    @property
    def violations(self) -> list[EptViolation]:
        return self.of(EptViolation)

    @property
    def exits(self) -> list[Exit]:
        return self.of(Exit)

    @property
    def frame_events(self) -> list[FrameEvent]:
        return self.of(FrameEvent)

    @property
    def block_events(self) -> list[BlockEvent]:
        return self.of(BlockEvent)

    def count(self, reason: ExitReason) -> int:
        return self.machine.reporter.counts[reason]

    def architectural(self) -> list[Modification]:
        """The modifications as the guest could know them: without the blocks that died."""
        return [evolve(record, blocks=()) for record in self.modifications]

    def state(self) -> tuple[dict[str, int], bytes, bytes]:
        """What the guest ends with: registers, RAM, printed text."""
        machine = self.machine
        return machine.vcpu.context.registers(), machine.read(0, MEMORY), bytes(machine.console.output)


def guest(
    segments: Mapping[int, bytes],
    *,
    maps: Iterable[PageMapping] = (),
    entry: int = CODE,
    code: Iterable[int] | None = None,
    mode: str = "long",
    cpl: int = 0,
    idt: int | None = None,
    rsp0: int = 0,
    registers: Mapping[str, int] | None = None,
    policy: Policy | None = None,
    paging: bool = True,
    limits: Limits | None = None,
    others: Iterable[CpuSpec] = (),
    schedule: Schedule | None = None,
    ipi: int | None = None,
) -> Guest:
    """A guest from {GPA: bytes}; segments whose GPA is in ``code`` (None: all) are executable, so code from the
    start."""
    executable = set(segments) if code is None else set(code)
    loaded = tuple(
        Segment(gpa, data, len(data), readable=True, writable=True, executable=gpa in executable, gva=gpa)
        for gpa, data in sorted(segments.items())
    )
    manifest = Manifest(
        path=Path("tiny"),
        name="tiny",
        image=Image("flat", Path("tiny"), 0),
        machine=MachineSpec(MEMORY, mode),  # type: ignore[arg-type]
        cpu=CpuSpec(entry, cpl, 3, {"rsp": STACK, **(registers or {})}, idt, rsp0),
        paging=Paging(None, tuple(maps)) if paging else None,
        policy=policy or Policy(code="load"),
        limits=limits or Limits(exits=200_000, seconds=60.0),
        others=tuple(others),
        schedule=schedule or Schedule(),
        ipi=Ipi(ipi),
    )
    entries = tuple(other.entry for other in manifest.others)
    return Guest(manifest, LoadedImage(loaded, entry, Symbols()), entry, entries)  # type: ignore[arg-type]


def build(
    source: str | Mapping[int, str | bytes],
    *,
    maps: Iterable[PageMapping] = (),
    options: RunOptions = STRICT,
    acts: bool = False,
    **rest,
) -> Tiny:
    """A machine that runs ``source``: assembly text at ``CODE``, or {GPA: text or bytes}.

    ``maps`` come on top of ``BASICS``. Text is assembled for its own GPA.
    """
    parts = {CODE: source} if isinstance(source, str) else source
    bits = {"long": 64, "protected": 32, "real": 16}[rest.get("mode", "long")]
    segments = {gpa: part if isinstance(part, bytes) else assemble(part, gpa, bits) for gpa, part in parts.items()}
    every = (*BASICS, *maps) if rest.get("paging", True) else ()
    return watch(Machine(guest(segments, maps=every, **rest), options), acts=acts)


def watch(machine: Machine, *, acts: bool = False) -> Tiny:
    """Keep all that a machine reports."""
    made = Tiny(machine)
    machine.observe(made.records.append, acts=acts)
    return made


def translations(tiny: Tiny) -> dict[tuple[int, int], int]:
    """The live blocks as {(linear address, size): number}."""
    return {(block.gva, block.size): block.number for block in tiny.machine.blocks}
