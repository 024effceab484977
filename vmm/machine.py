"""The machine: a guest, the rooms put together around it, and what a host program can do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from attrs import frozen

from vmm.cpu.defects import block_is_affected
from vmm.cpu.events import Event, EventType
from vmm.devices import ConsolePort, DebugExit, PortBus
from vmm.devices.from_manifest import attach_inputs
from vmm.ept import ExtendedPageTables, Permission
from vmm.ept.tables import GPA_LIMIT
from vmm.errors import AuditError, OptionError
from vmm.exits import BlockEvent, End, FrameEvent, Record
from vmm.guest import boot
from vmm.guest.boot import BootState
from vmm.guest.loader import Guest, load_guest
from vmm.inputs import Alias, Answer, Inject, Inputs, Interrupt, Protect, Seal, Stop, Write
from vmm.instruction_exits import InstructionExits
from vmm.linear import GuestLinearMemory
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.reporter import E, Handler, Observer, Reporter
from vmm.run_loop import RunLoop
from vmm.translation import Auditor, Block, BlockCache, Span
from vmm.translation.cache import DEFAULT_CAPACITY
from vmm.trap.door import Door
from vmm.trap.frames import RW, FrameControl, verify_frame
from vmm.trap.guard import StepGuard
from vmm.trap.policy import Trap, TrapPolicy
from vmm.vcpu import VirtualCpu, verify_engine


@frozen(slots=True)
class RunOptions:
    """How to run a guest, beyond what its manifest says.

    ``audit`` checks the bytes of every block at every entry (slow). ``check`` verifies the rules of the trap after
    every transition. ``single_step`` executes everything on the stepping engine, one instruction at a time, as an
    oracle for the rest. ``block_events`` has every block event reported. ``capacity`` is that of the block cache, in
    blocks. ``seconds`` overrides the manifest's wall-clock limit. ``input`` is what the guest reads at its input
    port instead of the manifest's file, ``time`` what its clock shows, in nanoseconds since 1970.
    """

    audit: bool = False
    check: bool = False
    single_step: bool = False
    block_events: bool = False
    capacity: int = DEFAULT_CAPACITY
    seconds: float | None = None
    input: bytes | None = None
    time: int | None = None


class Machine:
    """A guest on a virtual machine with one vCPU.

    Make one with ``from_manifest``, add observers and handlers, then ``run``. Guest-physical memory is read with
    ``read`` and changed with ``write``, which goes through the same door as the guest's own stores.
    """

    def __init__(self, guest: Guest, options: RunOptions | None = None) -> None:
        verify_engine()
        self.guest: Final = guest
        self.options: Final = options or RunOptions()
        state = boot.build(guest)
        self.inputs: Final = Inputs()
        self.reporter: Final = Reporter(guest.manifest.limits.exits, self.inputs)
        self.ports: Final = PortBus(self.inputs)
        self.memory: Final = GuestMemory(state.memory + len(state.system.data))
        self._ram_size = state.memory
        self._system_gpa = state.system.gpa
        self.frames: Final = Frames(self._first_gpa)
        self.ept: Final = ExtendedPageTables()
        self.blocks: Final = BlockCache(self._forget, capacity=self.options.capacity)
        self.door: Final = Door(self.memory, self.frames, self.blocks, self.reporter)
        self.instruction_exits: Final = InstructionExits(self.ports, self.reporter)
        self.vcpu: Final = VirtualCpu(
            self.memory, self.ept, self.frames, self.blocks, self.instruction_exits, audit=self.options.audit
        )
        self.instruction_exits.instruction = self.vcpu.instruction
        self.inputs.context = self.vcpu.context
        self.control: Final = FrameControl(
            self.ept,
            self.frames,
            self.blocks,
            flush=self.vcpu.free.flush_tlb,
            window_closed=lambda frame: self.door.journal_window(frame, self.vcpu.mmu),
            reporter=self.reporter,
            check=self.options.check,
        )
        self.loop: Final = self._make_loop()
        self.instruction_exits.inject = self.loop.pending.append
        #: How the run ended, once it has.
        self.end: End | None = None
        self.auditor: Final = Auditor(self.blocks, self.memory.read)
        self.vcpu.free.on_translate = self._translated
        self.vcpu.free.on_entry = self._entered
        if self.options.block_events:
            self.blocks.observer = self._report_block
        self.console: Final = ConsolePort(self._print)
        self._printers: list[Callable[[bytes], None]] = []
        self._attach_devices()
        self._load(state)

    @classmethod
    def from_manifest(cls, path: str | Path, options: RunOptions | None = None) -> Machine:
        """A machine for a bundled guest's name, a ``guest.toml``, a folder that holds one, or an ELF64 image.

        Raises ``InputError`` for anything that cannot be loaded, ``EngineError`` for an unknown Unicorn.
        """
        return cls(load_guest(path), options)

    # Running

    def run(self) -> End:
        """Run the guest to its end, within its limits.

        Raises ``AuditError`` for a stale block (with ``audit``), ``InvariantError`` for a broken rule (with
        ``check``), ``GuestError`` where a documented deviation from hardware stops the guest, and whatever a handler
        raises.
        """
        if not self.vcpu.free.open:
            raise OptionError("the machine is closed", where="run", fix="make a new one from the same guest")
        limits = self.guest.manifest.limits
        seconds = limits.seconds if self.options.seconds is None else self.options.seconds
        try:
            self.end = self.loop.run(seconds)
        except Exception as problem:
            problem.add_note(self.where())
            raise
        return self.end

    def close(self) -> None:
        """Give the engines' memory back now (some ten MB each), not when Python collects the machine.

        Registers, memory and counters can still be read. ``with`` closes at its end.
        """
        self.vcpu.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def where(self) -> str:
        """Where the guest is, in a line: address, symbol, mode, ring."""
        context = self.vcpu.context
        label = self.guest.image.symbols.label(context.pc)
        return f"guest at {context.pc:#x}{f' ({label})' if label else ''}, {context.mode} mode, ring {context.cpl}"

    def stop(self) -> None:
        """End the run at this boundary, for handlers and observers: what an EPT violation refused stays undone."""
        self.inputs.note(Stop())
        self.reporter.stopped = True
        self.loop.finish("stopped", {})

    def break_in(self) -> None:
        """End the run from another thread or a signal handler, at once; the machine cannot go on afterwards."""
        self.loop.break_in()

    # Watching and acting

    def observe(self, observer: Observer, *, acts: bool = False) -> None:
        """Have every record of the run handed to ``observer``, in order.

        With ``acts`` the observer may change the guest; every exit is then taken at an instruction boundary.
        """
        self.reporter.observe(observer, acts=acts)

    def on(self, kind: type[E]) -> Callable[[Handler[E]], Handler[E]]:
        """Decorator: call the function for each exit of a type, before the default answer.

        It may return True if it has dealt with the exit: the guest then goes on as it is. At ``EptViolation``,
        ``ExceptionExit``, ``Vmcall`` and ``EptMisconfiguration`` it may return an ``Event`` to deliver instead of
        the default answer. What it raises ends the run. Raises ``OptionError`` for a type that is no exit.
        """
        if not hasattr(kind, "reason"):
            fix = "give one of the exits in vmm.exits, or use observe"
            raise OptionError(f"{kind!r} is no exit", where="Machine.on", fix=fix)

        def register(handler: Handler[E]) -> Handler[E]:
            self.reporter.handle(kind, handler)
            return handler

        return register

    def on_output(self, printer: Callable[[bytes], None]) -> None:
        """Have what the guest prints handed to ``printer``, piece by piece."""
        self._printers.append(printer)

    def inject(self, event: Event) -> None:
        """Deliver an event at the next VM entry, whatever the guest's interrupt flag (event injection)."""
        self.inputs.note(Inject(event))
        self.loop.pending.append(event)

    def interrupt(self, vector: int) -> None:
        """Raise an external interrupt: delivered when RFLAGS.IF and the interrupt shadow allow it.

        ``vector`` is 0 to 255; raises ``OptionError`` for others.
        """
        event = Event(vector, EventType.EXTERNAL_INTERRUPT)
        self.inputs.note(Interrupt(vector))
        self.loop.interrupts.append(event.vector)

    def answer(self, value: int) -> None:
        """Have the IN whose exit is being reported read ``value``, cut to its size, whatever its device says."""
        self.inputs.note(Answer(value))
        self.instruction_exits.override = value

    def register(self, name: str) -> int:
        """A register by its name in a state file; raises ``KeyError`` for an unknown one."""
        return self.vcpu.context.registers()[name]

    # Guest-physical memory

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes; raises ``OptionError`` where there is no memory."""
        return b"".join(self.memory.read(hpa, length) for hpa, _, length in self._places(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        """Change memory from the host; raises ``OptionError`` where there is none, or it is sealed."""
        places = self._places(gpa, len(data))
        self._refuse_sealed(places, "write")
        pieces = [(hpa, where, data[where - gpa : where - gpa + length]) for hpa, where, length in places]
        with self.inputs.during(Write(gpa, data)):
            self.door.write(pieces, cause="host", mmu=self.vcpu.mmu)
            if any(hpa >= self._ram_size for hpa, _, _ in places):
                self.vcpu.mmu.tables_changed()
                self.vcpu.free.flush_tlb()

    def alias(self, gpa: int, target: int, size: int) -> None:
        """Make ``size`` bytes of GPAs reach the frames of other GPAs (all multiples of 4096).

        Raises ``OptionError`` for anything else, for GPAs from 2^48 on, and for targets without memory; then nothing
        has changed.
        """
        if (gpa | target | size) % PAGE or not 0 <= gpa <= gpa + size <= GPA_LIMIT:
            what = f"{size:#x} bytes at GPA {gpa:#x} for {target:#x}"
            raise OptionError(what, where="alias", fix="give multiples of 4096 below 2^48")
        places = self._places(target, size)
        with self.inputs.during(Alias(gpa, target, size)):
            for host, where, _ in places:
                self._map(gpa + where - target, self.frames.at(host))
            self.vcpu.mmu.frames_changed()
            self.vcpu.free.flush_tlb()

    def protect(self, gpa: int, size: int, access: Permission) -> None:
        """Change what the EPT allows for whole pages until the next change of their frame's state.

        Raises ``OptionError`` for writable and executable together, which no frame ever is, and for sealed frames
        that are to be writable.
        """
        if access & Permission.W and access & Permission.X:
            raise OptionError(f"access {access}", where="protect", fix="a frame is writable or executable, never both")
        places = self._places(gpa & -PAGE, size + gpa % PAGE)
        if access & Permission.W:
            self._refuse_sealed(places, "protect")
        with self.inputs.during(Protect(gpa, size, access)):
            for hpa, where, _ in places:
                self.control.protect(self.frames.at(hpa), access, where & -PAGE)
            self.vcpu.free.flush_tlb()

    def seal(self, gpa: int, size: int) -> None:
        """Make code final: every later store to these frames is refused, through whichever alias, for good."""
        places = self._places(gpa, size)
        with self.inputs.during(Seal(gpa, size)):
            for hpa, _, _ in places:
                frame = self.frames.at(hpa)
                if frame.state is not FrameState.SEALED:
                    self.control.move(frame, FrameState.SEALED, "seal")

    def verify(self) -> None:
        """Check the rules of the trap for every frame; raises ``InvariantError``."""
        for frame in self.frames:
            verify_frame(self.ept, self.blocks, frame)

    def _refuse_sealed(self, places: list[tuple[int, int, int]], what: str) -> None:
        for hpa, where, _ in places:
            if self.frames.at(hpa).state is FrameState.SEALED:
                raise OptionError(f"GPA {where:#x} is sealed", where=what, fix="sealed code never changes")

    def _places(self, gpa: int, size: int) -> list[tuple[int, int, int]]:
        """(HPA, GPA, bytes) page by page; raises ``OptionError`` where nothing is mapped."""
        if size < 0:
            raise OptionError(f"a size of {size}", where="guest memory", fix="give 0 or more bytes")
        places = []
        done = 0
        while done < size:
            where = gpa + done
            entry = self.ept.entry(where) if 0 <= where < GPA_LIMIT else None
            if entry is None or not entry.mapped:
                what = f"GPA {where:#x} has no memory"
                raise OptionError(what, where="guest memory", fix="stay inside the guest's RAM")
            length = min(size - done, PAGE - where % PAGE)
            places.append((entry.address | where % PAGE, where, length))
            done += length
        return places

    # Putting it together

    def _make_loop(self) -> RunLoop:
        vcpu, policy = self.vcpu, self.guest.manifest.policy
        guard = StepGuard(self.memory, self.frames, self.control, self.door, vcpu)
        trap = Trap(
            TrapPolicy(policy.reads, policy.writes),
            self.memory,
            self.frames,
            self.control,
            self.door,
            vcpu.mmu,
            vcpu.instruction,
            guard,
            self.reporter,
        )
        linear = GuestLinearMemory(self.memory, self.ept, vcpu.mmu, self.door, vcpu.context)
        return RunLoop(vcpu, trap, self.blocks, self.reporter, linear, self.options.single_step)

    def _attach_devices(self) -> None:
        manifest = self.guest.manifest
        self.ports.attach(self.console, manifest.console.port, inside=True)
        if manifest.end.port is not None:
            ended = DebugExit(lambda port, value: self.loop.finish("port", {"port": port, "value": value}))
            self.ports.attach(ended, manifest.end.port, inside=True)
        attach_inputs(self.ports, manifest, data=self.options.input, time=self.options.time)

    def _load(self, state: BootState) -> None:
        """Put the guest into memory and registers; image segments become code frames where the manifest says so."""
        self.ept.map_range(0, 0, state.memory, RW)
        system = state.system
        self.ept.map_range(system.gpa, state.memory, len(system.data), RW)
        for gpa, data in state.writes:
            self.memory.write(gpa, data)
        self.memory.write(state.memory, system.data)
        for gpa in state.code_frames:
            self.control.move(self.frames.at(gpa), FrameState.CODE, "image")
        self.vcpu.reset_to(state)
        paging = self.guest.manifest.paging
        if paging is not None and system.data:
            for offset in range(PAGE, len(system.data), PAGE):
                self.ept.protect(system.gpa + offset, Permission.R)
            self.vcpu.mmu.fix_tables(state.cr3, [(m.gva, m.gpa, m.length) for m in paging.effective(state.memory)])

    def _first_gpa(self, hpa: int) -> int:
        return hpa if hpa < self._ram_size else hpa - self._ram_size + self._system_gpa

    def _map(self, gpa: int, frame: Frame) -> None:
        """One more GPA for a frame; blocks of whatever was there before must go."""
        before = self.control.host_of(gpa)
        if before is not None:
            old = self.frames.at(before)
            self.blocks.invalidate(old.hpa, PAGE, "remap")
            old.gpas.remove(gpa)
        frame.gpas.append(gpa)
        self.ept.map(gpa, frame.hpa, self.control.permissions(frame))

    def _forget(self, hpa: int, size: int) -> None:
        self.vcpu.free.forget(hpa, size)

    def _print(self, data: bytes) -> None:
        for printer in self._printers:
            printer(data)

    # What the free-running engine tells

    def _translated(self, gva: int, size: int) -> None:
        """The engine has translated a block and is about to enter it."""
        spans = self._spans(gva, size)
        mode_flags, mode = self.vcpu.free.live.mode()
        code = b"".join([self.memory.read(address, length) for address, length in spans])
        block = self.blocks.create(gva, spans, mode_flags, mode, code)
        if self.blocks.overfull or not self.blocks.holds(block):
            self.vcpu.free.ask_to_stop()
        if block_is_affected(code, 64 if mode == "long" else 32):
            self.loop.step_over(spans)
            self.vcpu.free.ask_to_stop()

    def _entered(self, gva: int, size: int) -> None:
        """The engine enters a block (with ``audit``)."""
        mode_flags, _ = self.vcpu.free.live.mode()
        self.auditor.enter(gva, self._spans(gva, size)[0][0], mode_flags)

    def _spans(self, gva: int, size: int) -> tuple[Span, ...]:
        """Where the bytes of a block lie, by the pages that the engine fetched them from."""
        first = self.vcpu.mmu.fetch_host(gva)
        if first is not None and first % PAGE + size <= PAGE:
            return ((first, size),)
        spans = []
        done = 0
        while done < size:
            host = self.vcpu.mmu.fetch_host(gva + done)
            if host is None:
                raise AuditError(f"the engine translated code at {gva + done:#x} that it was never given")
            length = min(size - done, PAGE - host % PAGE)
            spans.append((host, length))
            done += length
        return tuple(spans)

    def _report_block(self, event: str, block: Block, cause: str) -> None:
        if self.reporter.observed:
            frame = self.frames.at(block.hpa)
            gpa = frame.gpas[0] + block.hpa % PAGE
            self.reporter.emit(
                BlockEvent(event, block.number, gpa, block.gva, block.size, block.mode, cause)
            )


__all__ = ["FrameEvent", "Machine", "Record", "RunOptions"]
