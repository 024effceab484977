"""The exits that an instruction causes by itself: port I/O, CPUID, and the reading of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmm.cpu.engine import Engine
from vmm.cpu.events import Event
from vmm.cpu.features import CpuidAnswer
from vmm.decode import io_operands
from vmm.devices import MemoryBus, PortBus
from vmm.exits import Cpuid, Exit, ExitReason, IoInstruction, Rdtsc, Rdtscp
from vmm.mmu import CurrentInstruction
from vmm.reporter import Reporter

#: Virtual time-stamp ticks that each VM exit takes. Without a board time depends on nothing else, so that runs repeat.
TICKS_PER_EXIT: Final = 1000

_IN: Final = 1 << 3


class InstructionExits:
    """Implements ``vmm.vcpu.Platform`` for a port bus, the devices in memory, and a reporter.

    An access is answered in the middle of a block, unless its device or a handler may act on the guest: then the
    guest stops before the instruction, which is stepped.
    """

    def __init__(self, bus: PortBus, memory: MemoryBus, reporter: Reporter) -> None:
        self.bus: Final = bus
        #: Loads from devices in guest-physical memory; the exits that bring them here are EPT violations.
        self.device_read: Final = memory.read
        #: What a script wants the current IN to read.
        self.override: int | None = None
        self.instruction: CurrentInstruction
        #: Has an event delivered before the next instruction.
        self.inject: Callable[[Event], None]
        #: What CPUID says on this platform, by leaf, subleaf and CR4; None for the engine's own answer.
        self.features: Callable[[int, int, int], CpuidAnswer | None] | None = None
        #: Virtual time, in ticks of the time-stamp counter.
        self.clock: Callable[[], int] = lambda: reporter.total * TICKS_PER_EXIT
        #: Told of each exit that is answered in the middle of a block, by a board whose time goes on with it.
        self.answered: Callable[[], None] | None = None
        self._reporter = reporter

    @property
    def _wants_boundary(self) -> bool:
        """Whether the guest has to come out: someone may act on it, or its run is to end."""
        reporter = self._reporter
        return reporter.interactive or reporter.over_budget or reporter.stopped

    def port_in(self, engine: Engine, port: int, size: int, *, exact: bool) -> int | None:
        """IN."""
        if not exact and (self._wants_boundary or self.bus.is_exact(port)):
            return None
        value = self.bus.read(port, size)
        self._reporter.count(ExitReason.IO_INSTRUCTION)
        if self._reporter.observed:
            self.override = None
            self._report(engine, port, size, value, "in")
            value = self._answer(value) & (1 << 8 * size) - 1
        self._pass(exact=exact)
        return value

    def _answer(self, value: int) -> int:
        """What a script or handler wants the guest to read, or else what the device said."""
        return value if self.override is None else self.override

    def port_out(self, engine: Engine, port: int, size: int, value: int, *, exact: bool) -> bool:
        """OUT."""
        if not exact and (self._wants_boundary or self.bus.is_exact(port)):
            return False
        self._reporter.count(ExitReason.IO_INSTRUCTION)
        if not (self._reporter.observed and self._report(engine, port, size, value, "out")):
            self.bus.write(port, size, value)
        self._pass(exact=exact)
        return True

    def cpuid(self, engine: Engine, leaf: int, subleaf: int, *, exact: bool) -> CpuidAnswer | bool:
        """CPUID; the processor's own answer stands, unless the platform has another."""
        if not exact and self._wants_boundary:
            return False
        self._reporter.count(ExitReason.CPUID)
        if self._reporter.observed:
            self._consult(Cpuid(rip=engine.pc, leaf=leaf, subleaf=subleaf))
        self._pass(exact=exact)
        if self.features is None:
            return True
        _, _, cr4, _, _ = engine.live.control()
        answer = self.features(leaf, subleaf, cr4)
        return True if answer is None else answer

    def timestamp(self, engine: Engine, *, with_processor_id: bool, exact: bool) -> int | None:
        """RDTSC and RDTSCP read virtual time."""
        if not exact and self._wants_boundary:
            return None
        self._reporter.count(ExitReason.RDTSCP if with_processor_id else ExitReason.RDTSC)
        now = self.clock()
        if self._reporter.observed:
            kind = Rdtscp if with_processor_id else Rdtsc
            self._consult(kind(rip=engine.pc, value=now))
        self._pass(exact=exact)
        return now

    def _pass(self, *, exact: bool) -> None:
        if self.answered is not None and not exact:
            self.answered()

    def _report(self, engine: Engine, port: int, size: int, value: int, direction: str) -> bool:
        pc = engine.pc
        string, repeated, immediate = io_operands(self.instruction.bytes_at(pc))
        qualification = (
            size - 1
            | (_IN if direction == "in" else 0)
            | string << 4
            | repeated << 5
            | immediate << 6
            | port << 16
        )
        return self._consult(
            IoInstruction(rip=pc, port=port, size=size, direction=direction, value=value, qualification=qualification)
        )

    def _consult(self, record: Exit) -> bool:
        """Show an exit; whether a handler has dealt with it. An event that one wants comes after the instruction."""
        decision = self._reporter.exit(record)
        if isinstance(decision, Event):
            self.inject(decision)
        return decision is True
