"""One vCPU at work: enter the guest, see why it came out, answer, go on."""

from __future__ import annotations

from collections import deque
from typing import Final

from attrs import define, field

from vmm import exits, records
from vmm.board import Board
from vmm.control_fields import ControlFields
from vmm.cpu import layout
from vmm.cpu.delivery import TripleFault, deliver
from vmm.cpu.engine import FETCH, READ, WRITE, Stop
from vmm.cpu.events import Event, EventType, Vector
from vmm.cpu.state import LinearMemory
from vmm.cpu.syscall import syscall
from vmm.decode import Decoded
from vmm.ept.bits import PERMISSION_MASK, USER_EXECUTE
from vmm.ept.qualification import encode
from vmm.ept.views import Views
from vmm.exits import ExitReason
from vmm.memory import PAGE
from vmm.mmu import (
    ForbiddenStructure,
    GuestFault,
    LogFull,
    LogIsFull,
    Misconfiguration,
    NonCanonical,
    StaleUse,
    Stepwise,
    Unflushed,
    Unjudged,
    UnmappedStructure,
    Violation,
    Watched,
)
from vmm.monitor_trap import MonitorTrapFlag, cancelling
from vmm.paging.access import ErrorCode
from vmm.reporter import Reporter
from vmm.run_state import RunState
from vmm.tlb import StrictTlb
from vmm.translation import BlockCache, Span
from vmm.trap.log import LogKeeper
from vmm.trap.policy import DeniedAccess, Trap, UnmappedAccess
from vmm.trap.refusal import RunEnded
from vmm.trap.virtualization import VIRTUALIZATION_EXCEPTION
from vmm.vcpu import VirtualCpu
from vmm.vm_functions import VMFUNC, chosen_view, is_undefined

_UNDEFINED: Final = Event(Vector.UD, EventType.HARDWARE_EXCEPTION)
_RFLAGS_TF: Final = 1 << 8
_RFLAGS_IF: Final = 1 << 9
_LOW_32: Final = 0xFFFF_FFFF
_ALLOWED: Final = PERMISSION_MASK | USER_EXECUTE
_NMI: Final = Event(Vector.NMI, EventType.NMI)
_VMCALL: Final = b"\x0f\x01\xc1"


@define(slots=True, eq=False)
class Processor:
    """Runs one vCPU, by turns if there are others.

    Everything that the guest can do comes out of the engines as a ``Stop``; everything that the host wants comes
    in through ``pending`` (events to inject), ``interrupts`` (external interrupts) and ``state``. ``interrupts`` is
    what a local APIC has in its IRR (SDM vol. 3, 11.8.4): a vector is pending or not, and the highest is taken first.
    """

    vcpu: VirtualCpu
    trap: Trap
    blocks: BlockCache
    reporter: Reporter
    linear: LinearMemory
    state: RunState
    single_step: bool
    views: Views
    fields: ControlFields
    #: Strict staleness, None without it.
    tlb: StrictTlb | None = None
    pending: deque[Event] = field(factory=deque)
    interrupts: set[int] = field(factory=set)
    #: The devices around it; None for a processor that has nothing but ports.
    board: Board | None = None
    #: Reads the page-modification log; None without one.
    log: LogKeeper | None = None
    #: Whether it waits at a HLT.
    halted: bool = False
    monitor_trap: MonitorTrapFlag = field(factory=MonitorTrapFlag)
    _stepped_block: tuple[tuple[Span, ...], str] = ((), "")

    @property
    def ready(self) -> bool:
        """Whether it has something to execute: it is not halted, or an event wakes it."""
        if not self.halted or self.pending:
            return True
        return self._interrupted and bool(self.vcpu.context.rflags & _RFLAGS_IF)

    @property
    def _interrupted(self) -> bool:
        """Whether an external interrupt is pending, deliverable or not."""
        return bool(self.interrupts) or (self.board is not None and self.board.interrupting)

    def raise_nmi(self) -> None:
        """Have an NMI delivered at the next boundary; one that is pending already takes it in."""
        if _NMI not in self.pending:
            self.pending.append(_NMI)
        if self.board is not None:
            self.board.come_out()

    def take_turn(self, instructions: int | None) -> None:
        """Run until the end of the run, a halt, or the end of the turn: after that many instructions (None: no end)."""
        pace, state = self.vcpu.pace, self.state
        self.halted = False
        if instructions is not None:
            pace.begin(instructions)
        while not (state.is_over or self.halted or pace.is_over):
            if self.board is not None:
                self.board.settle()
                if state.ending is not None:  # somebody outside has ended the run here: nothing more is delivered
                    break
            if self.monitor_trap.watches():
                self._monitored()
                continue
            if self.pending or self._interrupted:
                self._deliver_what_is_due()
                if self.monitor_trap.watches():
                    continue
            if state.ending is None and not pace.is_over:
                stop = self._enter()
                if not (stop is Stop.REFUSED and pace.is_over):  # the first fetch of the next turn, which will see
                    self._answer(stop)

    # Entering

    def _enter(self) -> Stop | Event | None:
        """VM entry: let the guest execute, freely or one instruction, until it comes out."""
        vcpu = self.vcpu
        if self.single_step or self.interrupts or vcpu.instruction.held is not None or vcpu.pace.in_tail:
            return self._step()
        if self.board is not None:
            self.board.arm()
        return vcpu.run()

    def _step(self) -> Stop | Event | None:
        """Execute exactly one instruction; None if it completed."""
        context = self.vcpu.context
        decoded = self.vcpu.instruction.decoded
        view, pc = self.vcpu.view, context.pc
        code, bits = (self.vcpu.instruction.code, context.code_bits) if view is not None else (b"", 64)
        control = (context.cr0, context.cr3, context.cr4)
        address = None if self.tlb is None else self._invalidated(decoded)
        if self.board is not None:
            self.board.spend()
        try:
            outcome = self.trap.step()
        except UnmappedAccess as problem:
            self._unmapped(problem)
            return None
        if view is not None and (outcome is None or context.pc != pc):
            view.synchronised(code, bits, lambda: self._line_of(decoded))
        if outcome is None and decoded.is_hlt:
            return Stop.HALT
        if decoded.changes_mappings or control != (context.cr0, context.cr3, context.cr4):
            if self.tlb is not None and outcome is None:
                now = (context.cr0, context.cr3, context.cr4)
                self.tlb.executed(self.vcpu.number, decoded, address, control, now)
            self.vcpu.free.flush_tlb()
        return outcome

    def _invalidated(self, decoded: Decoded) -> int | None:
        """The linear address that INVLPG is about to invalidate; None for any other instruction."""
        return self.vcpu.instruction.address_of(decoded.operands[0]) if decoded.is_invlpg else None

    def _line_of(self, decoded: Decoded) -> int | None:
        """The HPA that the memory operand of an instruction names; None if nothing is mapped there."""
        return self.vcpu.mmu.peek(self.vcpu.instruction.address_of(decoded.operands[0]))

    def step_over(self, spans: tuple[Span, ...], cause: str) -> None:
        """Have the block that is about to be entered stepped instead of executed freely, each time."""
        self._stepped_block = spans, cause

    def _step_block(self) -> Stop | Event | None:
        """Step until the guest leaves a block that must not be executed freely; the block is forgotten."""
        (spans, cause), self._stepped_block = self._stepped_block, ((), "")
        for address, size in spans:
            self.blocks.evict(address, size, cause)
        outcome = None
        while outcome is None and not self._is_wanted_outside:
            outcome = self._step()
            if self.board is not None:
                self.board.settle()
            here = self.vcpu.mmu.fetch_host(self.vcpu.context.pc)
            if here is None or not any(address <= here < address + size for address, size in spans):
                break
        return outcome

    @property
    def _is_wanted_outside(self) -> bool:
        """Whether the run loop has something to do before the next instruction."""
        taken = self._interrupted and self._interruptible
        over = self.state.is_over or self.vcpu.pace.is_over or self.monitor_trap.watches()
        return over or bool(self.pending) or taken

    def _deliver_what_is_due(self) -> None:
        """Inject pending events, then an external interrupt if the guest takes one at this boundary."""
        if self.pending:
            self._deliver(self.pending.popleft())
        elif self._interruptible:
            vector = self._take_interrupt()
            self.reporter.count(ExitReason.EXTERNAL_INTERRUPT)
            if self.reporter.observed:
                self.reporter.exit(exits.ExternalInterrupt(rip=self.vcpu.context.pc, vector=vector))
            self._deliver(Event(vector, EventType.EXTERNAL_INTERRUPT))

    def _take_interrupt(self) -> int:
        """The vector of the interrupt that is taken now."""
        if self.board is not None and not self.interrupts:
            return self.board.acknowledge()
        vector = max(self.interrupts)
        self.interrupts.remove(vector)
        return vector

    @property
    def _interruptible(self) -> bool:
        context = self.vcpu.context
        return bool(context.rflags & _RFLAGS_IF) and not context.in_shadow

    # Answering

    def _answer(self, stop: Stop | Event | None) -> None:
        match stop:
            case Stop.REFUSED:
                self._refused()
            case None | Stop.STEPPED:
                pass
            case Event():
                self._raise(stop)
            case Stop.INTERRUPT:
                self._raise(self.vcpu.exception())
            case Stop.INVALID:
                self._invalid()
            case Stop.SYSCALL:
                self._syscall()
            case Stop.SYSENTER:
                self._raise(_UNDEFINED)
            case Stop.HALT:
                self._halt()
            case Stop.EXACT:
                self._execute()
            case Stop.ASKED:
                self.blocks.trim()
                if self._stepped_block[0]:
                    self._answer(self._step_block())

    def _execute(self) -> None:
        """Step the instruction that wants a boundary before it, unless somebody has ended the run there."""
        if self.state.ending is None:
            self._answer(self._step())

    def _refused(self) -> None:
        """A TLB fill was refused: by the guest's page tables, or by the EPT."""
        refusal = self.vcpu.mmu.refusal
        match refusal:
            case (Violation() | Unjudged() | Watched()) if self._is_stepped_first(refusal):
                self._answer(self._step())
            case Stepwise() | Unflushed() | StaleUse():
                self._answer_strictly(refusal)
            case Unjudged():
                self._answer(self.trap.answer_use(refusal))
            case Violation():
                try:
                    self._answer(self.trap.answer(refusal))
                except UnmappedAccess as problem:
                    self._unmapped(problem)
            case (GuestFault() | NonCanonical() | LogFull()) if self._is_early(refusal.page, refusal.access):
                self._answer(self._step())
            case (GuestFault() | NonCanonical()) if refusal.access != FETCH and self._is_undefined():
                self._raise(_UNDEFINED)
            case GuestFault() | NonCanonical():
                self._raise(self._fault(refusal))
            case Misconfiguration():
                self._misconfigured(refusal)
            case LogFull():
                self._log_full()
            case None:
                raise AssertionError("a fill was refused without a reason")

    def _answer_strictly(self, refusal: Stepwise | Unflushed | StaleUse) -> None:
        """Strict staleness: step, or flush the engines, or put on record what is owed to a stale mapping."""
        assert self.tlb is not None
        if isinstance(refusal, Unflushed):
            self.tlb.flush()
        elif isinstance(refusal, Stepwise) or self._is_early(refusal.page, refusal.access):
            self._answer(self._step())
        else:
            self.tlb.report(refusal, self.vcpu.instruction)

    def _fault(self, refusal: GuestFault | NonCanonical) -> Event:
        """The #PF, #SS or #GP that is due; the engine loads before it stores, but a read-modify-write is a write."""
        instruction = self.vcpu.instruction
        if isinstance(refusal, NonCanonical):
            stack = refusal.access != FETCH and instruction.uses_stack(refusal.page)
            return Event(Vector.SS if stack else Vector.GP, EventType.HARDWARE_EXCEPTION, 0)
        error_code = refusal.error_code
        address = instruction.faulting_address(refusal.page, refusal.access)
        if refusal.access == READ and instruction.modifies(address):
            error_code |= ErrorCode.WRITE
        return Event(Vector.PF, EventType.HARDWARE_EXCEPTION, error_code, cr2=address)

    def _is_undefined(self) -> bool:
        """Whether the current instruction is none: the engine loads an operand before it finds out."""
        return not self.vcpu.instruction.decoded.length

    def _is_stepped_first(self, refusal: Violation | Unjudged | Watched) -> bool:
        """Whether to see what a step makes of it: it is monitored, or too early to judge a fetch.

        W^X policies and views judge fetches that happen; the EPT's own answer to one that comes early harms nobody.
        """
        if isinstance(refusal, Watched):
            return True
        judged = self.trap.refusals.keeps_wx or (isinstance(refusal, Violation) and self.trap.is_denied(refusal))
        return judged and self._is_early(refusal.page, refusal.access)

    def _is_early(self, page: int, access: int) -> bool:
        """Whether a fetch fault may come too early (quirk "early-fetch").

        The engine translates a block over the end of a page before it executes the instructions in front of it.
        A step fetches no more than its own instruction.
        """
        return access == FETCH and page != self.vcpu.context.pc & -PAGE and not self.vcpu.stepped

    def _raise(self, event: Event) -> None:
        """An exception or software interrupt of the guest: a VM exit, then its delivery."""
        of_guest = event.type in (EventType.SOFTWARE_INTERRUPT, EventType.OTHER_EVENT)
        if of_guest or event is VIRTUALIZATION_EXCEPTION:
            self._deliver(event)
            return
        self.reporter.count(ExitReason.EXCEPTION_OR_NMI)
        decision: Event | bool | None = None
        if self.reporter.observed:
            decision = self.reporter.exit(
                exits.ExceptionExit(
                    rip=self.vcpu.context.pc,
                    vector=int(event.vector),
                    error_code=event.error_code,
                    address=event.cr2,
                )
            )
        if decision is not True:
            self._deliver(decision if isinstance(decision, Event) else event)

    def _deliver(self, event: Event) -> None:
        context = self.vcpu.context
        if event.type is EventType.OTHER_EVENT:
            self.monitor_trap.pending = True
            return
        self.vcpu.pace.spend()
        try:
            delivered = deliver(context, self.linear, event)
        except RunEnded:
            return
        except TripleFault:
            self.reporter.count(ExitReason.TRIPLE_FAULT)
            if self.reporter.observed:
                self.reporter.exit(exits.TripleFault(rip=context.pc))
            self.state.finish("triple fault", {"vector": int(event.vector)})
            return
        except UnmappedStructure as problem:
            self.state.finish("unmapped memory", {"gpa": problem.gpa, "gva": problem.linear})
            return
        except LogIsFull:
            self._log_full()
            self.pending.appendleft(event)
            return
        except ForbiddenStructure as problem:
            self._forbidden(event, problem)
            return
        context.end_shadow()
        self.monitor_trap.pending = self.monitor_trap.control
        if self.reporter.observed:
            done = delivered.event
            name = done.type.name.lower().replace("_", " ")
            self.reporter.emit(records.Injection(int(done.vector), name, done.error_code, context.pc))

    def _forbidden(self, event: Event, problem: ForbiddenStructure) -> None:
        """A view does not allow what an event's delivery reaches for: a handler may mend that, for another try."""
        violation = problem.violation
        self.reporter.count(ExitReason.EPT_VIOLATION)
        decision: Event | bool | None = None
        gpa = violation.gpa | (problem.linear % PAGE if violation.final else 0)
        if self.reporter.observed:
            qualification = encode(
                read=violation.access == READ or violation.updates,
                write=violation.access == WRITE or violation.updates,
                fetch=False,
                allowed=violation.leaf & _ALLOWED,
                final=violation.final,
                advanced=0,
            )
            view = self.vcpu.mmu.view.shown
            exit_ = exits.EptViolation(self.vcpu.context.pc, qualification, gpa, problem.linear, view)
            decision = self.reporter.exit(exit_)
        if decision is None:
            self.state.finish("EPT violation", {"gpa": gpa, "gva": problem.linear})
        else:
            self.pending.appendleft(decision if isinstance(decision, Event) else event)

    def _vmfunc(self) -> None:
        """VMFUNC (see ``vmm.vm_functions``). Like a VMCALL, one that a handler has dealt with is done."""
        context = self.vcpu.context
        eax, ecx = (context.gprs[number] & _LOW_32 for number in (0, 1))
        if is_undefined(self.views, eax):
            self._raise(_UNDEFINED)
            return
        view = chosen_view(self.views, self.fields, eax, ecx)
        if view is None:
            self.reporter.count(ExitReason.VMFUNC)
            decision: Event | bool | None = None
            if self.reporter.observed:
                decision = self.reporter.exit(exits.Vmfunc(rip=context.pc, eax=eax, ecx=ecx))
            if decision is not True:
                self._deliver(decision or _UNDEFINED)
                return
        else:
            self.vcpu.use(view)
            self.fields.eptp_index = ecx
            self.reporter.charge()
            if self.reporter.observed:
                self.reporter.emit(records.ViewEvent("switched", view.number, "vmfunc", rip=context.pc))
        context.rip += len(VMFUNC)
        self.vcpu.pace.spend()

    def _invalid(self) -> None:
        """#UD, or an instruction that this engine reports as invalid but the processor knows."""
        context = self.vcpu.context
        code = self.vcpu.instruction.code
        if code.startswith(_VMCALL):
            self.reporter.count(ExitReason.VMCALL)
            if self.reporter.observed:
                decision = self.reporter.exit(exits.Vmcall(rip=context.pc, rax=context.gprs[0]))
                if isinstance(decision, Event):
                    self._deliver(decision)
                    return
            context.rip += len(_VMCALL)
            self.vcpu.pace.spend()
        elif code.startswith(VMFUNC):
            self._vmfunc()
        elif (decoded := self.vcpu.instruction.decoded).is_int1:
            context.end_resume()
            self._raise(Event(Vector.DB, EventType.PRIVILEGED_SOFTWARE_EXCEPTION, length=decoded.length))
        else:
            self._raise(_UNDEFINED)

    def _syscall(self) -> None:
        context = self.vcpu.context
        self.vcpu.pace.spend()
        undefined = syscall(
            context,
            star=context.syscall_msr(layout.STAR),
            lstar=context.syscall_msr(layout.LSTAR),
            fmask=context.syscall_msr(layout.FMASK),
        )
        if undefined is not None:
            self._raise(undefined)

    def _halt(self) -> None:
        """HLT: wait for an interrupt; with none to come, or none that would be taken, the run is over."""
        context = self.vcpu.context
        self.reporter.count(ExitReason.HLT)
        if self.reporter.observed:
            self.reporter.exit(exits.Hlt(rip=context.pc - 1))
        context.end_shadow()
        self.halted = True
        if self.board is not None and context.rflags & _RFLAGS_IF:
            while not (self.ready or self.state.is_over) and self.board.sleep():
                pass
        if self.ready or self.state.is_over:
            self.halted = False

    def _log_full(self) -> None:
        """An access needs room in the page-modification log; it is tried again afterwards."""
        if self.log is not None:
            self.log.full(self.vcpu.context.pc)

    def _misconfigured(self, refusal: Misconfiguration) -> None:
        """The host has set up the EPT wrongly; only a handler can mend that."""
        self.reporter.count(ExitReason.EPT_MISCONFIGURATION)
        decision: Event | bool | None = None
        gpa = refusal.gpa
        if refusal.final:
            gpa |= self.vcpu.instruction.faulting_address(refusal.page, refusal.access) & PAGE - 1
        if self.reporter.observed:
            decision = self.reporter.exit(exits.EptMisconfiguration(rip=self.vcpu.context.pc, gpa=gpa))
        if isinstance(decision, Event):
            self._deliver(decision)
        elif decision is None:
            self.state.finish("EPT misconfiguration", {"gpa": gpa})

    def _unmapped(self, problem: UnmappedAccess) -> None:
        where = {"gpa": problem.violation.gpa, "gva": problem.violation.page}
        if isinstance(problem, DeniedAccess):
            self.state.finish("EPT violation", where)
        else:
            self.state.finish("unmapped memory", where)

    # With the monitor trap flag

    def _monitored(self) -> None:
        """A pending MTF exit, or the delivery of one event, or one instruction (see ``vmm.monitor_trap``)."""
        monitor = self.monitor_trap
        if monitor.pending:
            self._monitor_trap_exit()
            return
        if self.pending or self._interrupted:
            self._deliver_what_is_due()
        if monitor.pending or self.pending or self.state.is_over or self.vcpu.pace.is_over:
            return
        before = cancelling(self.reporter.counts)
        if self._monitored_step(before) and before == cancelling(self.reporter.counts):
            monitor.pending = monitor.control

    def _monitored_step(self, exits_before: int) -> bool:
        """Execute one instruction, or iteration of a REP, and answer what comes of it; whether it completed."""
        context = self.vcpu.context
        traps = context.rflags & _RFLAGS_TF
        repeated = self.vcpu.instruction.decoded
        stop = self._step()
        if stop is None and repeated.repeats and context.gprs[1] & repeated.operands[0].mask == 0:
            stop = self._step()  # quirk "rep-end"
        if stop is Stop.INTERRUPT and traps and context.vector == Vector.DB and not context.by_instruction:
            debug = self.vcpu.exception()
            if exits_before == cancelling(self.reporter.counts):
                self._monitor_trap_exit()
            self._raise(debug)
        else:
            self._answer(stop)
        return stop in (None, Stop.SYSCALL)

    def _monitor_trap_exit(self) -> None:
        self.monitor_trap.pending = False
        self.reporter.count(ExitReason.MTF)
        if self.reporter.observed:
            self.reporter.exit(exits.Mtf(rip=self.vcpu.context.pc))
