"""The rooms put together: everything that a machine consists of, made and connected, with the guest loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from vmm.block_events import BlockEvents, reporting
from vmm.coherence import Coherence, FetchSides, FetchView, Sanitizer
from vmm.control_fields import ControlFields
from vmm.cpu.features import pc_cpuid
from vmm.devices import ConsolePort, DebugExit, InterprocessorPort, MemoryBus, PortBus, Workpiece
from vmm.devices.from_manifest import attach_inputs
from vmm.devices.local_apic_timer import FREQUENCY as CLOCK
from vmm.devices.workpiece import PORTS as WORKPIECE_PORTS
from vmm.ept import ExtendedPageTables, PageModificationLog, Permission
from vmm.ept.views import Views
from vmm.errors import OptionError
from vmm.guest import boot
from vmm.guest.boot import BootState
from vmm.guest.loader import Guest
from vmm.guest.manifest import WorkpieceSpec
from vmm.host_memory import HostMemory
from vmm.host_monitors import HostMonitors
from vmm.host_views import HostViews
from vmm.inputs import Inputs, Place
from vmm.instruction_exits import InstructionExits
from vmm.linear import GuestLinearMemory
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.pc import Pc
from vmm.processor import Processor
from vmm.reporter import Reporter
from vmm.run_loop import RunLoop
from vmm.run_options import RunOptions, with_policy
from vmm.run_state import RunState
from vmm.scheduler import Scheduler
from vmm.tlb import StrictTlb
from vmm.translation import BlockCache
from vmm.trap.callers import Callers
from vmm.trap.device_memory import DeviceMemory
from vmm.trap.door import Door
from vmm.trap.frames import RW, RWX, FrameControl
from vmm.trap.guard import StepGuard
from vmm.trap.log import LogKeeper
from vmm.trap.policy import Trap, TrapPolicy
from vmm.trap.refusal import Refusals
from vmm.trap.sub_pages import SubPages
from vmm.trap.virtualization import VirtualizationExceptions
from vmm.vcpu import VirtualCpu, verify_engine


class Assembly:
    """What a ``Machine`` consists of; its public attributes of the same names are these."""

    def __init__(self, guest: Guest, options: RunOptions) -> None:
        verify_engine()
        self.options: Final = options
        guest = with_policy(guest, options)
        self.guest: Final = guest
        state = guest.boot or boot.build(guest)
        self.inputs: Final = Inputs()
        self.reporter: Final = Reporter(guest.manifest.limits.exits, self.inputs)
        self.ports: Final = PortBus(self.inputs)
        #: The devices in guest-physical memory.
        self.memory_bus: Final = MemoryBus()
        model = self.options.coherence or Coherence(guest.manifest.policy.coherence)
        twins = 0 if model is Coherence.COHERENT else len(state.cpus)
        self.memory: Final = GuestMemory(state.memory + len(state.system.data), twins=twins)
        self.frames: Final = Frames(state.memory, state.system.gpa)
        self.ept: Final = ExtendedPageTables(self.options.ept or guest.manifest.ept, host_size=self.memory.size)
        self.every_view: Final = Views(self.ept, self.frames, self._allowed)
        self.blocks: Final = BlockCache(self._forget, capacity=self.options.capacity)
        self.door: Final = Door(self.memory, self.frames, self.blocks, self.reporter)
        self.several = len(state.cpus) > 1
        self.exits: Final[list[InstructionExits]] = []
        self.control: Final = self._make_control()
        self.state: Final = RunState(self.reporter, self._stop_engines)
        #: Strict staleness (``docs/tlb.md``); None where translations are cached as it comes.
        self.tlb: Final = self._make_tlb() if guest.manifest.policy.tlb == "strict" else None
        #: Watches for stale code under a weaker coherence model; None where code is coherent.
        self.sanitizer: Final = None if model is Coherence.COHERENT else self._make_sanitizer(model, len(state.cpus))
        #: The vCPUs, by number.
        self.vcpus: Final = [self._make_vcpu(number) for number in range(len(state.cpus))]
        self._fields: Final = [ControlFields() for _ in self.vcpus]
        #: Views of the EPT.
        self.views: Final = self._make_views()
        self.inputs.contexts = [vcpu.context for vcpu in self.vcpus]
        self.loop: Final = self._make_loop()
        self.host_memory: Final = self._make_host_memory()
        self._keep_logs()
        self.events: Final = [self._hear(processor) for processor in self.loop.processors]
        #: Monitors and hidden patches (see ``monitor``, ``hook`` and ``patch_hidden``).
        self.monitors: Final = HostMonitors(self, self.events, self.flush, self._forget_fetches)
        if self.options.block_events:
            self.blocks.observer = reporting(
                self.frames, self.reporter, self.memory.home, several=self.several
            )
        self.console: Final = ConsolePort(self._print)
        self.printers: list[Callable[[bytes], None]] = []
        #: The devices of a PC; None where the guest has nothing but a few ports.
        self.pc: Final = self._make_pc() if guest.is_pc else None
        self._attach_devices()
        self._load(state)

    def _make_control(self) -> FrameControl:
        return FrameControl(
            self.memory,
            self.every_view,
            self.blocks,
            home=self.memory.home,
            flush=self.flush,
            window_closed=lambda frame: self.door.journal_window(frame, self.current.mmu),
            reporter=self.reporter,
            check=self.options.check,
        )

    def _make_views(self) -> HostViews:
        return HostViews(
            self.every_view,
            self.frames,
            self.inputs,
            self.reporter,
            self.vcpus,
            self._fields,
            keeps_wx=self.keeps_wx,
            flush=self.flush,
            tlb=self.tlb,
        )

    def _make_host_memory(self) -> HostMemory:
        return HostMemory(
            self.memory,
            self.frames,
            self.every_view,
            self.blocks,
            self.control,
            self.door,
            self.inputs,
            self.vcpus,
            keeps_wx=self.keeps_wx,
            current=lambda: self.current.mmu,
            flush=self.flush,
            tlb=self.tlb,
        )

    def _make_sanitizer(self, model: Coherence, vcpus: int) -> Sanitizer:
        sides = FetchSides(vcpus, self.memory, self.blocks, self.flush, self._forget_fetches)
        sanitizer = Sanitizer(model, sides, self.memory, self.frames, self.reporter)
        self.door.sanitizer = sanitizer
        self.reporter.interactive = True  # so that what is stale is reported before the exit that comes after it
        return sanitizer

    def _make_tlb(self) -> StrictTlb:
        tlb = StrictTlb(self.memory, self.reporter, self.flush)
        self.control.invalidate = tlb.invalidate_gpa
        self.ept.entry_written = tlb.ept_entry_written
        self.door.tables = tlb
        return tlb

    def _make_vcpu(self, number: int) -> VirtualCpu:
        exits = InstructionExits(self.ports, self.memory_bus, self.reporter)
        vcpu = VirtualCpu(
            self.memory,
            self.every_view.all[0],
            self.frames,
            self.blocks,
            exits,
            number=number,
            hears_entries=self.options.audit or self.several or self.sanitizer is not None,
            counts_entries=self.guest.is_pc,
            view=None if self.sanitizer is None else FetchView(self.sanitizer, number),
            tlb=self.tlb,
        )
        vcpu.pace.counts = self.several or self.sanitizer is not None
        exits.instruction = vcpu.instruction
        self.exits.append(exits)
        return vcpu

    def _make_loop(self) -> RunLoop:
        scheduler = Scheduler(self.seed, self.guest.manifest.schedule.quantum)
        return RunLoop([self._make_processor(vcpu) for vcpu in self.vcpus], scheduler, self.state, self.reporter)

    def _make_processor(self, vcpu: VirtualCpu) -> Processor:
        policy = self.guest.manifest.policy
        guard = StepGuard(self.memory, self.frames, self.control, self.door, vcpu)
        if self.options.callers:
            guard.callers = Callers(self.memory, self.frames, vcpu.mmu, vcpu.context)
        refusals = Refusals(
            policy.wx, self.frames, vcpu.mmu, vcpu.context, vcpu.instruction, self.reporter, finish=self.state.finish
        )
        if refusals.keeps_wx:
            vcpu.mmu.judges = True
            self.door.written = self.control.open_window
        trap = Trap(
            TrapPolicy(policy.reads, policy.writes),
            self.frames,
            self.control,
            self.door,
            vcpu.mmu,
            vcpu.instruction,
            guard,
            self.reporter,
            refusals,
        )
        linear = GuestLinearMemory(self.memory, vcpu.mmu, self.door, vcpu.context, refusals)
        if self.ept.sub_pages is not None:
            trap.sub_pages = SubPages(
                vcpu.mmu, self.ept.sub_pages, vcpu.instruction, self.reporter, finish=self.state.finish
            )
        stepped = self.options.single_step or not self.options.traps
        if self.tlb is not None:
            trap.stepped = self.tlb.written
        fields = self._fields[vcpu.number]
        if self.ept.profile.virtualization_exceptions:
            trap.exceptions = VirtualizationExceptions(
                self.memory, self.frames, self.door, vcpu.mmu, vcpu.context, fields
            )
        trap.denials_fault = self.guest.manifest.views.denied == "fault"
        processor = Processor(
            vcpu, trap, self.blocks, self.reporter, linear, self.state, stepped, self.every_view, fields, self.tlb
        )
        self.exits[vcpu.number].inject = processor.pending.append
        return processor

    def _hear(self, processor: Processor) -> BlockEvents:
        return BlockEvents(
            processor.vcpu, self.memory, self.blocks, processor.step_over, audit=self.options.audit
        )

    def _keep_logs(self) -> None:
        """A page-modification log for each vCPU; the first one's is in the EPT from the start."""
        log = self.ept.log
        for number, processor in enumerate(self.loop.processors if log is not None else ()):
            own = PageModificationLog() if number or log is None else log
            processor.log = LogKeeper(number, own, self.every_view, self.reporter, self.flush, self.tlb)

    def _make_pc(self) -> Pc:
        """A PC's board for the first vCPU, whose time is the machine's."""
        processor = self.loop.processors[0]
        countdown = processor.vcpu.free.countdown
        assert countdown is not None
        apic = self.guest.has_apic
        pc = Pc(
            self.reporter,
            countdown,
            self.inputs,
            send=self.console.emit,
            reset=lambda: self.state.finish("reset", {}),
            nmi=processor.raise_nmi if apic else None,
        )
        processor.board = pc
        self.exits[0].clock, self.exits[0].features = pc.now, partial(pc_cpuid, apic_clock=CLOCK if apic else 0)
        self.exits[0].answered = pc.exit_answered
        self._attach_memory(pc, processor)
        return pc

    def _attach_memory(self, pc: Pc, processor: Processor) -> None:
        """Have the first vCPU reach the devices that a PC has in memory."""
        pc.attach_memory(self.memory_bus)
        if self.memory_bus.ranges:
            vcpu = processor.vcpu
            processor.trap.devices = DeviceMemory(self.memory_bus, vcpu, self.reporter)
            for gpa, size in self.memory_bus.ranges:
                vcpu.stepping.map_device(gpa, size)

    def number_of(self, vcpu: int | None, where: str) -> int:
        """The number of a vCPU, None being the one at work; raises ``OptionError`` for one that there is not."""
        if vcpu is not None and not 0 <= vcpu < len(self.vcpus):
            raise OptionError(f"vCPU {vcpu}", where=where, fix=f"there are {len(self.vcpus)}, counted from 0")
        return self.current.number if vcpu is None else vcpu

    def keeper_of(self, vcpu: int | None) -> LogKeeper:
        """What keeps the page-modification log of a vCPU; raises ``OptionError`` where nothing is logged."""
        keeper = self.loop.processors[self.number_of(vcpu, "page-modification log")].log
        if keeper is None:
            fix = "give a profile with page_modification_log and accessed_dirty"
            raise OptionError("nothing is logged", where="page-modification log", fix=fix)
        return keeper

    def raise_interrupt(self, vector: int, vcpu: int) -> None:
        """Make an external interrupt of a vCPU pending, as a device does."""
        self.loop.processors[vcpu].interrupts.add(vector)

    def _attach_devices(self) -> None:
        manifest = self.guest.manifest
        if self.pc is not None:
            self.pc.attach(self.ports)
        self.ports.attach(self.console, manifest.console.port, inside=True)
        if manifest.end.port is not None:
            ended = DebugExit(lambda port, value: self.state.finish("port", {"port": port, "value": value}))
            self.ports.attach(ended, manifest.end.port, inside=True)
        if manifest.ipi.port is not None:
            ipi = InterprocessorPort(len(self.vcpus), lambda: self.current.number, self.raise_interrupt)
            self.ports.attach(ipi, manifest.ipi.port, inside=True)
        if manifest.workpiece is not None:
            self._attach_workpiece(manifest.workpiece)
        attach_inputs(self.ports, manifest, data=self.options.input, time=self.options.time)

    def _attach_workpiece(self, spec: WorkpieceSpec) -> None:
        workpiece = Workpiece(spec.port, spec.flaws, spec.lead, lambda: self.raise_interrupt(spec.vector, 0))
        self.ports.attach(workpiece, spec.port, WORKPIECE_PORTS, inside=True)

    def _load(self, state: BootState) -> None:
        """Put the guest into memory and registers; image segments become code frames where the manifest says so."""
        self.ept.map_range(0, 0, state.memory, RW if self.options.traps else RWX)
        system = state.system
        self.ept.map_range(system.gpa, state.memory, len(system.data), RW)
        for gpa, data in state.writes:
            self.memory.write(gpa, data)
        self.memory.write(state.memory, system.data)
        state_of_code = FrameState.SEALED if self.guest.manifest.policy.code == "seal" else FrameState.CODE
        for gpa in state.code_frames if self.options.traps else ():
            self.control.move(self.frames.at(gpa), state_of_code, "image")
        for each in self.guest.manifest.ept_maps if self.options.traps else ():
            self.host_memory.protect(each.gpa, each.length, each.access, user_execute=each.user_execute)
            for gpa in range(each.gpa, each.gpa + each.length, PAGE) if each.sub_pages else ():
                self.host_memory.protect_sub_pages(gpa, each.sub_pages)
        for vcpu in self.vcpus:
            vcpu.reset_to(state)
        paging = self.guest.manifest.paging
        # With EPT accessed and dirty flags each walk writes to the guest's tables, as far as the EPT is concerned.
        if paging is not None and system.data and not self.ept.profile.accessed_dirty:
            for offset in range(PAGE, len(system.data), PAGE):
                self.ept.protect(system.gpa + offset, Permission.R)
            mappings = [(m.gva, m.gpa, m.length) for m in paging.effective(state.memory)]
            for vcpu in self.vcpus:
                vcpu.mmu.fix_tables(state.cr3, mappings)
        self.guest.manifest.views.apply(self.views, len(self.vcpus))

        for gva, patch in self.guest.hidden:
            self.monitors.patch_hidden(self.monitors.physical(gva), patch)

    @property
    def current(self) -> VirtualCpu:
        """The vCPU at work."""
        return self.loop.current.vcpu

    def _allowed(self, frame: Frame) -> Permission:
        """What the state of a frame allows; everything where there are no traps."""
        return self.control.permissions(frame) if self.options.traps else RWX

    def _forget(self, hpa: int, size: int) -> None:
        for vcpu in self.vcpus:
            vcpu.free.forget(hpa, size)

    def flush(self) -> None:
        """Make every engine forget its address translations."""
        for vcpu in self.vcpus:
            vcpu.free.flush_tlb()

    def _forget_fetches(self) -> None:
        for vcpu in self.vcpus:
            vcpu.mmu.forget_all_fetches()

    def _stop_engines(self) -> None:
        for vcpu in self.vcpus:
            if vcpu.free.countdown is not None:
                vcpu.free.countdown.hurry()
            else:
                vcpu.free.ask_to_stop()

    def _print(self, data: bytes) -> None:
        if self.printers:
            with self.inputs.at(Place.OUTPUT):
                for printer in self.printers:
                    printer(data)

    @property
    def keeps_wx(self) -> bool:
        """Whether the run has a W^X policy."""
        return self.guest.manifest.policy.wx != "off"

    @property
    def seed(self) -> int:
        """The seed of the interleaving, from the options or the manifest: 64 bits."""
        return self.guest.manifest.schedule.seed if self.options.seed is None else self.options.seed
