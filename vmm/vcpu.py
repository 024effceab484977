"""One virtual processor: its state, its two engines, its address translation, its trap."""

from __future__ import annotations

from typing import Protocol

from vmm.coherence import FetchView
from vmm.cpu import binding as b
from vmm.cpu import layout
from vmm.cpu.context import Context
from vmm.cpu.early_flags import computes_flags, is_conditional_store
from vmm.cpu.engine import Engine, Stop
from vmm.cpu.events import Event, EventType, Vector
from vmm.cpu.features import CpuidAnswer
from vmm.cpu.free import FreeRunningEngine
from vmm.cpu.state import SegmentName
from vmm.cpu.stepping import SteppingEngine
from vmm.ept.views import View
from vmm.guest.boot import BootState
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frames
from vmm.mmu import CurrentInstruction, Mmu, StepMemory
from vmm.pace import Pace
from vmm.records import StaleExecution
from vmm.tlb import StrictMmu, StrictTlb
from vmm.translation import BlockCache

#: Vectors that push an error code (SDM vol. 3, table 6-1).
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21})
_LOADED: tuple[SegmentName, ...] = ("es", "ds", "fs", "gs", "ldtr", "tr", "ss", "cs")


class Platform(Protocol):
    """What a vCPU needs of the machine: ports, time, and an ear for the exits that go with them.

    ``exact`` is whether the call comes from a stepped instruction. A call that is not may decline, and comes
    again with ``exact`` set, at the boundary before the instruction.
    """

    def port_in(self, engine: Engine, port: int, size: int, *, exact: bool) -> int | None:
        """The value that IN reads; None to decline."""

    def port_out(self, engine: Engine, port: int, size: int, value: int, *, exact: bool) -> bool:
        """Do an OUT; False to decline."""

    def cpuid(self, engine: Engine, leaf: int, subleaf: int, *, exact: bool) -> CpuidAnswer | bool:
        """What CPUID says, or True for the engine's own answer; False to decline."""

    def timestamp(self, engine: Engine, *, with_processor_id: bool, exact: bool) -> int | None:
        """The virtual time-stamp counter; None to decline."""

    def device_read(self, gpa: int, size: int) -> int:
        """The value that a load from a device gets."""


class VirtualCpu:
    """A vCPU between VM entries; ``context`` is its state."""

    def __init__(
        self,
        memory: GuestMemory,
        ept: View,
        frames: Frames,
        blocks: BlockCache,
        platform: Platform,
        *,
        number: int,
        hears_entries: bool,
        counts_entries: bool = False,
        view: FetchView | None = None,
        tlb: StrictTlb | None = None,
    ) -> None:
        self.number = number
        #: What it fetches under a weaker coherence model; None if it is coherent.
        self.view = view
        self._blocks = blocks
        self.free = FreeRunningEngine(memory, hears_entries=hears_entries, counts_entries=counts_entries)
        self.stepping = SteppingEngine(memory)
        self.context = Context(self.free.handle)
        #: Whether translations are cached as long as they may be, so that what invalidates them is stepped.
        self.strict = tlb is not None
        if tlb is None:
            self.mmu = Mmu(memory, ept, frames, self.context)
        else:
            self.mmu = StrictMmu(memory, ept, frames, self.context, tlb=tlb, number=number)
        self.mmu.fetch_side = view
        #: Whether the last instruction was stepped, not free-run.
        self.stepped = False
        self.free.environment = _Environment(platform, self.free, exact=False)
        self.free.fill = self.mmu.fills_of_free(self.free)
        self.stepping.environment = _Environment(platform, self.stepping, exact=True)
        self.instruction = CurrentInstruction(self.context, self.mmu)
        self.step_memory = StepMemory(memory, frames, self.context, self.mmu, self.instruction)
        self.stepping.fill = self.step_memory.fills_of(self.stepping)
        self.pace = Pace(self.free.ask_to_stop)

    def use(self, view: View) -> None:
        """Use another view of the EPT from the next access on."""
        self.mmu.use(view)
        self.free.flush_tlb()

    def step(self) -> Stop:
        """Execute one instruction on the stepping engine."""
        self.stepped = True
        flags, pc = self.context.raw_flags, self.context.pc
        repeats = self.pace.counts and self.instruction.decoded.repeats
        stale = None if self.view is None else self._look(self.view, self.instruction.decoded.length)
        stop = self.stepping.step(self.context)
        if stop is Stop.REFUSED:
            self.context.raw_flags = flags  # quirk "early-flags"
        self.pace.step(moved=self.context.pc != pc, repeats=repeats, complete=stop is Stop.STEPPED)
        if stale is not None and self.view is not None and stop is not Stop.REFUSED:
            self.view.report(stale)
        return stop

    def _look(self, view: FetchView, length: int) -> StaleExecution | None:
        """What there is to report if the instruction at RIP, of so many bytes, is executed."""
        pc = self.context.pc
        room = min(length, PAGE - pc % PAGE)
        hosts = [(self.mmu.fetch_host(pc), room), (self.mmu.fetch_host(pc + room), length - room)]
        return view.look(pc, [(host, size) for host, size in hosts if host is not None and size])

    def close(self) -> None:
        """Give both engines' memory back."""
        self.free.close()
        self.stepping.close()

    def reset_to(self, boot: BootState) -> None:
        """Load the initial state of a guest."""
        context, cpu = self.context, boot.cpus[self.number]
        context.cr0, context.cr3, context.cr4, context.efer = boot.cr0, boot.cr3, boot.cr4, boot.efer
        for name, value in cpu.gprs.items():
            context.set_gpr(name, value)
        context.rip = cpu.rip
        context.rflags = cpu.rflags
        context.gdtr, context.idtr = boot.gdtr, cpu.idtr
        for segment in _LOADED:
            context.set_segment(segment, cpu.segments[segment])
        context.refresh_hidden_flags(cpl=cpu.segments["ss"].dpl if boot.mode != "real" else 0)
        for index, value in enumerate(cpu.xmm):
            context.write_xmm(index, value)
        context.write(b.REG_MXCSR, cpu.mxcsr)
        context.write(b.REG_FCW, cpu.fcw)

    def run(self) -> Stop:
        """Free-run until something is refused or asks for the VMM."""
        self.stepped = False
        stop = self.free.run(self.context)
        self.pace.leave(self.context.pc)
        if stop is Stop.REFUSED:
            self._mend_flags()
        elif self.view is not None and self._is_raised_here(stop):
            stale = self._look(self.view, self.instruction.decoded.length)
            if stale is not None:
                self.view.report(stale)
        return stop

    def _is_raised_here(self, stop: Stop) -> bool:
        """Whether the instruction at RIP is what ended a run, without completing."""
        if stop is Stop.INTERRUPT:
            return not self.context.by_instruction and self.context.vector != Vector.DB
        return stop in (Stop.INVALID, Stop.SYSCALL, Stop.SYSENTER)

    def _mend_flags(self) -> None:
        """Undo what a refused SETcc did to the flags (quirk "early-flags")."""
        context = self.context
        if not context.flags_may_be_computed:
            return
        code = self.instruction.code
        if not is_conditional_store(code):
            return
        if computes_flags(code, context.flag_operation, self._block_so_far(), context.code_bits):
            context.recover_flags()

    def _block_so_far(self) -> bytes | None:
        """The code from the start of the block that the engine is in up to RIP; None if that is not known."""
        pc = self.context.pc
        host = self.mmu.fetch_host(pc)
        if host is None:
            return None
        mine = [b for b in self._blocks.overlapping(host, 1) if b.vcpu == self.number]
        inside = [b for b in mine if b.gva <= pc < b.gva + b.size]
        return inside[-1].code[: pc - inside[-1].gva] if inside else None

    def exception(self) -> Event:
        """The event that the last run or step stopped with (``Stop.INTERRUPT``); RIP goes back to an INT."""
        context, vector = self.context, self.context.vector
        if not context.by_instruction:
            error_code = context.error_code if vector in _WITH_ERROR_CODE else None
            return Event(vector, EventType.HARDWARE_EXCEPTION, error_code)
        length = self._int_length(vector)
        context.rip -= length
        context.end_resume()
        kind = EventType.SOFTWARE_EXCEPTION if length == 1 else EventType.SOFTWARE_INTERRUPT
        return Event(vector, kind, length=length)

    def _int_length(self, vector: int) -> int:
        """Length of the INT n (2 bytes), INT3 or INTO (1 byte) that ends at RIP; prefixes are not counted."""
        opcode = self.mmu.code_bytes(self.context.pc - 1)[:1]
        return 1 if (vector, opcode) in ((3, b"\xcc"), (4, b"\xce")) else 2


class _Environment:
    """Connects one engine to its machine."""

    def __init__(self, platform: Platform, engine: Engine, *, exact: bool) -> None:
        self._platform = platform
        self._engine = engine
        self._exact = exact

    def port_in(self, port: int, size: int) -> int | None:
        return self._platform.port_in(self._engine, port, size, exact=self._exact)

    def port_out(self, port: int, size: int, value: int) -> bool:
        return self._platform.port_out(self._engine, port, size, value, exact=self._exact)

    def cpuid(self, leaf: int, subleaf: int) -> CpuidAnswer | bool:
        return self._platform.cpuid(self._engine, leaf, subleaf, exact=self._exact)

    def timestamp(self, *, with_processor_id: bool) -> int | None:
        return self._platform.timestamp(self._engine, with_processor_id=with_processor_id, exact=self._exact)

    def device_read(self, gpa: int, size: int) -> int:
        return self._platform.device_read(gpa, size)


def verify_engine() -> None:
    """Check once a process that this Unicorn is the one that the VMM knows; raises ``EngineError``."""
    if not _verified:
        layout.verify()
        _verified.append(True)


_verified: list[bool] = []
