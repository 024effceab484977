"""The machine: a guest, the rooms put together around it, and what a host program can do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from vmm.assembly import Assembly
from vmm.cpu.events import Event, EventType
from vmm.ept import PageModificationLog, Permission
from vmm.ept.bits import ADDRESS_MASK
from vmm.errors import OptionError
from vmm.guest.loader import Guest, load_guest
from vmm.inputs import Answer, DrainLog, Inject, Interrupt, Invept, Invvpid, JournalWindows, MonitorTrap, Stop
from vmm.monitors import HiddenPatch, Monitor
from vmm.monitors.monitor import After, Before, Condition
from vmm.records import End, FrameEvent, Record
from vmm.reporter import E, Handler, Observer
from vmm.run_options import RunOptions
from vmm.trap.frames import verify_frame
from vmm.vcpu import VirtualCpu


class Machine:
    """A guest on a virtual machine, with one vCPU or several that share memory, EPT and block cache.

    Make one with ``from_manifest``, add observers and handlers, then ``run``. Guest-physical memory is read with
    ``read`` and changed with ``write``, which goes through the same door as the guest's own stores.
    """

    def __init__(self, guest: Guest, options: RunOptions | None = None) -> None:
        self.options: Final = options or RunOptions()
        parts = Assembly(guest, self.options)
        self._parts: Final = parts
        self.guest: Final = parts.guest
        self.inputs: Final = parts.inputs
        self.reporter: Final = parts.reporter
        self.ports: Final = parts.ports
        self.memory: Final = parts.memory
        self.frames: Final = parts.frames
        self.ept: Final = parts.ept
        self.blocks: Final = parts.blocks
        self.door: Final = parts.door
        self.control: Final = parts.control
        self.state: Final = parts.state
        #: Strict staleness (``docs/tlb.md``); None where translations are cached as it comes.
        self.tlb: Final = parts.tlb
        #: Watches for stale code under a weaker coherence model; None where code is coherent.
        self.sanitizer: Final = parts.sanitizer
        #: The vCPUs, by number.
        self.vcpus: Final = parts.vcpus
        #: Views of the EPT.
        self.views: Final = parts.views
        self.loop: Final = parts.loop
        self.host_memory: Final = parts.host_memory
        #: Monitors and hidden patches (see ``monitor``, ``hook`` and ``patch_hidden``).
        self.monitors: Final = parts.monitors
        self.console: Final = parts.console
        #: The devices of a PC; None where the guest has nothing but a few ports.
        self.pc: Final = parts.pc
        #: How the run ended, once it has.
        self.end: End | None = None

    @classmethod
    def from_manifest(cls, path: str | Path, options: RunOptions | None = None) -> Machine:
        """A machine for a bundled guest's name, a ``guest.toml``, a folder that holds one, or an image without one.

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
        if not self._parts.current.free.open:
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
        for vcpu in self.vcpus:
            vcpu.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def where(self) -> str:
        """Where the guest is, in a line: address, symbol, mode, ring."""
        context = self._parts.current.context
        label = self.guest.image.symbols.label(context.pc)
        which = f", vCPU {self._parts.current.number}" if self._parts.several else ""
        place = f"{context.pc:#x}{f' ({label})' if label else ''}"
        return f"guest at {place}, {context.mode} mode, ring {context.cpl}{which}"

    def stop(self) -> None:
        """End the run at this boundary, for handlers and observers: what an EPT violation refused stays undone."""
        self.inputs.note(Stop())
        self.reporter.stopped = True
        self.state.finish("stopped", {})
        if self.pc is not None:
            self.pc.come_out()

    def break_in(self) -> None:
        """End the run from another thread or a signal handler, at once; the machine cannot go on afterwards."""
        self.state.break_in()

    # Watching and acting

    def observe(self, observer: Observer, *, acts: bool = False) -> None:
        """Have every record of the run handed to ``observer``, in order.

        With ``acts`` the observer may change the guest; every exit is then taken at an instruction boundary.
        """
        self.reporter.observe(observer, acts=acts)

    def on(self, kind: type[E]) -> Callable[[Handler[E]], Handler[E]]:
        """Decorator: call the function for each exit of a type, before the default answer.

        It may return True if it has dealt with the exit: the guest then goes on as it is. At ``EptViolation``,
        ``ExceptionExit``, ``Vmcall``, ``Vmfunc`` and ``EptMisconfiguration`` it may return an ``Event`` to deliver
        instead of the default answer. What it raises ends the run. Raises ``OptionError`` for a type that is no exit.
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
        self._parts.printers.append(printer)

    def type_in(self, data: bytes) -> int:
        """Have the first serial port of a PC receive ``data``, as from somebody at its console.

        How many bytes it takes: up to 1 MiB may be waiting for the guest. Raises ``OptionError`` where there is none.
        """
        if self.pc is None:
            raise OptionError("no serial port", where="type_in", fix="use a guest that is a PC, as `vmm boot` has it")
        return self.pc.receive(data)

    def inject(self, event: Event, *, vcpu: int | None = None) -> None:
        """Deliver an event at the next VM entry of a vCPU, whatever its interrupt flag (event injection).

        None is the vCPU at work. One that has halted is woken. Raises ``OptionError`` for a vCPU that there is not.
        """
        number = self._parts.number_of(vcpu, "inject")
        self.inputs.note(Inject(event, number))
        self.loop.processors[number].pending.append(event)

    def interrupt(self, vector: int, *, vcpu: int = 0) -> None:
        """Raise an external interrupt: delivered when RFLAGS.IF and the interrupt shadow of the vCPU allow it.

        ``vector`` is 0 to 255. One that is pending already stays pending once; of several the highest is delivered
        first. Raises ``OptionError`` for other vectors, and for a vCPU that there is not.
        """
        self._parts.number_of(vcpu, "interrupt")
        event = Event(vector, EventType.EXTERNAL_INTERRUPT)
        self.inputs.note(Interrupt(vector, vcpu))
        self._parts.raise_interrupt(event.vector, vcpu)

    def monitor_trap_flag(self, vcpu: int = 0, *, on: bool = True) -> None:
        """Switch the "monitor trap flag" VM-execution control of a vCPU (SDM vol. 3, 26.5.2).

        While it is on, the vCPU executes one instruction, or is delivered one event, at a time, with an ``Mtf`` exit
        after each that no other exit came before. Injecting ``Event(0, EventType.OTHER_EVENT)`` makes one exit
        pending whatever the control says. Raises ``OptionError`` for a vCPU that there is not.
        """
        self._parts.number_of(vcpu, "monitor_trap_flag")
        self.inputs.note(MonitorTrap(vcpu, on))
        self.loop.processors[vcpu].monitor_trap.control = on

    def answer(self, value: int) -> None:
        """Let the IN whose exit is being reported read ``value``, cut to its size."""
        self.inputs.note(Answer(value))
        self._parts.exits[self._parts.current.number].override = value

    @property
    def vcpu(self) -> VirtualCpu:
        """The first vCPU: the only one of most guests."""
        return self.vcpus[0]

    def register(self, name: str) -> int:
        """A register of the first vCPU by its name in a state file; raises ``KeyError`` for an unknown one."""
        return self.vcpu.context.registers()[name]

    # Guest-physical memory

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes; raises ``OptionError`` where there is no memory."""
        return self.host_memory.read(gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        """Change memory from the host; raises ``OptionError`` where there is none, or it is sealed.

        Under a W^X policy the frames are no longer approved.
        """
        self.host_memory.write(gpa, data)

    def alias(self, gpa: int, target: int, size: int) -> None:
        """Make ``size`` bytes of GPAs reach the frames of other GPAs (all multiples of 4096).

        Raises ``OptionError`` for anything else, for GPAs from 2^48 on, for GPAs that lead to sealed frames, and for
        targets without memory; then nothing has changed.
        """
        self.host_memory.alias(gpa, target, size)

    def protect(
        self,
        gpa: int,
        size: int,
        access: Permission,
        *,
        user_execute: bool | None = None,
        invalidate: bool = True,
    ) -> None:
        """Change what the EPT allows for whole pages until the next change of their frame's state.

        With mode-based execute control ``user_execute`` says whether to allow fetches from user-mode linear addresses;
        X is then for supervisor-mode ones only. None: as X says. Without ``invalidate`` there is no INVEPT after it,
        so that processors may go on by what they have cached.

        Raises ``OptionError`` for writable and executable together, which no frame ever is, for sealed frames
        that are to be writable, and for frames that a W^X policy has not approved and that are to be executable.
        """
        self.host_memory.protect(gpa, size, access, user_execute=user_execute, invalidate=invalidate)

    def protect_sub_pages(self, gpa: int, writable: int) -> None:
        """Make the page at ``gpa`` read-only but for some of its sub-pages of 128 bytes (SDM vol. 3, 29.3.4).

        Bit n of ``writable``, 0 to 31, is for bytes 128n to 128n + 127. It holds until ``protect``; while the frame is
        code, its stores are trapped as any other's. Raises ``OptionError`` without memory there, for a sealed frame,
        and for an EPT profile without ``sub_page_write``.
        """
        self.host_memory.protect_sub_pages(gpa, writable)

    def approve(self, gpa: int, size: int) -> None:
        """Let the frames of ``size`` bytes be executed as they are now, under a W^X policy, until they are written.

        Raises ``OptionError`` where there is no memory, and in a run without such a policy.
        """
        self.host_memory.approve(gpa, size)

    def seal(self, gpa: int, size: int) -> None:
        """Make code final: every later store to these frames is refused, through whichever alias, for good.

        An instruction that is under way, as when a device seals in the middle of an INS, is completed first. Under
        a W^X policy the frames are approved by this.
        """
        self.host_memory.seal(gpa, size)

    def log(self, vcpu: int | None = None) -> PageModificationLog:
        """The page-modification log of a vCPU, with its index (29.3.6); None is the vCPU at work.

        Raises ``OptionError`` for a vCPU that there is not, and where nothing is logged: it takes an EPT profile with
        ``page_modification_log`` and ``accessed_dirty``.
        """
        return self._parts.keeper_of(vcpu).log

    def drain_log(self, *, clean: bool = False, vcpu: int | None = None) -> tuple[int, ...]:
        """Empty the page-modification log of a vCPU: the GPAs of the pages that it has written, in order (29.3.6).

        None is the vCPU at work. Each page was logged when its dirty flag was set, hence once, by the vCPU that set it.
        With ``clean`` the flags of these pages are cleared, so that the next write to one is logged again. Raises
        ``OptionError`` as ``log`` does.
        """
        keeper = self._parts.keeper_of(vcpu)
        with self.inputs.during(DrainLog(clean, keeper.vcpu)):
            return keeper.drain(clean=clean)

    def invept(self, eptp: int | None = None) -> None:
        """INVEPT on every vCPU, single-context for the EPT that ``eptp`` selects or, with None, all-context.

        It is what a change of entries in ``ept`` itself asks for (SDM vol. 3, 29.4.3.1).
        ``ept.write_entry`` changes what the processor finds, whatever the state of the frames; to have a GPA lead
        elsewhere for good, or to allow more or less, use ``alias`` and ``protect``, which know about code.
        """
        self.inputs.note(Invept(eptp))
        if self.tlb is not None:
            self.tlb.invept(None if eptp is None else eptp & ADDRESS_MASK)
        self._parts.flush()

    def invvpid(self, type: int, *, vpid: int | None = None, linear: int | None = None) -> None:  # noqa: A002 - the manual's word
        """INVVPID of a type: 0 individual address, 1 single context, 2 all contexts, 3 single context but globals.

        ``vpid`` is the number of a vCPU plus 1, for all types but 2; ``linear`` an address, for type 0. Raises
        ``OptionError`` for anything else (SDM vol. 3, 31.3, INVVPID).
        """
        if type not in range(4) or (vpid is None) != (type == 2) or (linear is None) != (type != 0):
            what = f"INVVPID of type {type} with VPID {vpid} and address {linear}"
            raise OptionError(what, where="invvpid", fix="give types 0, 1 and 3 a VPID, and type 0 an address")
        if vpid is not None and not 1 <= vpid <= len(self.vcpus):
            raise OptionError(f"VPID {vpid}", where="invvpid", fix=f"there are 1 to {len(self.vcpus)}")
        self.inputs.note(Invvpid(type, vpid, linear))
        if self.tlb is not None:
            self.tlb.invvpid(type, vpid, linear)
        self._parts.flush()

    def journal_windows(self) -> None:
        """Put on record now what was written through windows that are open; they stay open.

        From then on the journal accounts for every byte of every frame that was ever code. Without it a window's
        difference is journaled when it closes, before anything in it can be executed.
        """
        with self.inputs.during(JournalWindows()):
            self.door.journal_windows(self._parts.current.mmu)

    def verify(self) -> None:
        """Check the rules of the trap for every frame, if there is a trap; raises ``InvariantError``."""
        for frame in self.frames if self.options.traps else ():
            verify_frame(self._parts.every_view, self.blocks, frame)

    # Monitors, hooks, hidden patches

    def physical(self, place: str | int) -> int:
        """The GPA behind a symbol of the image or a linear address, by the page tables of the vCPU at work as they are.

        Raises ``OptionError`` for an unknown symbol, and where nothing is mapped.
        """
        return self.monitors.physical(place)

    def monitor(
        self,
        gpa: int,
        size: int,
        access: str,
        *,
        before: Before | None = None,
        after: After | None = None,
        condition: Condition | None = None,
    ) -> Monitor:
        """See the guest's accesses to the frames' bytes at [gpa, gpa + size), through whichever address.

        ``access`` is one or more of "r" (loads), "w" (stores) and "x" (execution of an instruction with a byte there).
        ``before`` is called when the access is about to happen, and may return True (it does not happen, and the guest
        goes on where RIP is) or an ``Event`` (delivered in its place). ``after`` is called when it has happened. Both
        only where ``condition`` is true of the access. Accesses of the processor itself (page walks, event delivery)
        and of the host are not seen. Any number of monitors may share a page.

        Raises ``OptionError`` where there is no memory, and for another ``access``.
        """
        return self.monitors.monitor(gpa, size, access, before, after, condition)

    def hook(self, place: str | int, callback: Before, *, condition: Condition | None = None) -> Monitor:
        """Call back whenever the instruction at a symbol or linear address is about to execute: a hidden breakpoint.

        No byte of the guest changes, so that there is nothing to find, and the guest may rewrite the page. It is a
        monitor for "x" of the first byte, for instructions that start there; ``callback`` is its ``before``.
        """
        gpa = self.physical(place)
        return self.monitors.monitor(gpa, 1, "x", callback, None, condition, at_start=True)

    def patch_hidden(self, gpa: int, data: bytes) -> HiddenPatch:
        """Have ``data`` executed in place of what is at ``gpa``, while loads and stores reach what is there.

        It stays when the guest writes there, until it is removed; of two that overlap the later one counts. Raises
        ``OptionError`` where there is no memory, for sealed code, for more than 64 frames with hidden patches, and
        under a weaker coherence model.
        """
        return self.monitors.patch_hidden(gpa, data)

    # What was counted

    @property
    def keeps_wx(self) -> bool:
        """Whether the run has a W^X policy."""
        return self._parts.keeps_wx

    @property
    def stale(self) -> int:
        """Executions of stale code under a weaker coherence model, but for those of what another vCPU has written."""
        return 0 if self.sanitizer is None else self.sanitizer.found - self.sanitizer.of_others

    @property
    def stale_translations(self) -> int:
        """Uses of stale translations that were reported, under strict staleness."""
        return 0 if self.tlb is None else self.tlb.found

    @property
    def seed(self) -> int:
        """The seed of the interleaving, from the options or the manifest: 64 bits."""
        return self._parts.seed

    @property
    def audited(self) -> int:
        """Block entries that the auditor has checked."""
        return sum(events.auditor.entries for events in self._parts.events)


__all__ = ["FrameEvent", "Machine", "Record", "RunOptions"]
