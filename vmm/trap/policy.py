"""Which refused access is answered how: the state table of ``vmm.memory.frames`` as code.

======================  ==============================================================================
refused access          answer
======================  ==============================================================================
fetch from data         the frame becomes code
fetch from a window     what changed is journaled as a diff; the frame becomes code again
store to code           one instruction is stepped (``step``), or the frame becomes a window (``window``),
                        or steps first and a window once it is hot (``adaptive``), or once it is hot and
                        no page tables let it be executed any more (``attribute``)
read of code            one instruction is stepped, or the frame becomes R-X (``grant``),
                        or steps first and R-X once it is read often (``adaptive``)
store to sealed         #GP(0), the bytes stay
page walk in code       the frame becomes R-X; accessed and dirty flags go through the door
======================  ==============================================================================

With a W^X policy (``vmm.trap.wx``) a store to code opens a window, unless it is refused, and a fetch from data or a
window is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from attrs import define, frozen

from vmm.cpu.engine import FETCH, READ, WRITE, Stop
from vmm.cpu.events import Event
from vmm.ept.bits import PERMISSION_MASK, USER_EXECUTE
from vmm.ept.qualification import encode
from vmm.ept.sub_pages import SubPageVerdict
from vmm.errors import OptionError
from vmm.exits import EptViolation, ExitReason, Mtf
from vmm.memory import PAGE
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.mmu import CurrentInstruction, Mmu, Unjudged, Violation, Watched
from vmm.mmu.refusals import PagingStructureViolation, Refusal
from vmm.reporter import Reporter
from vmm.trap.device_memory import DeviceMemory
from vmm.trap.door import Door, SealedFrame
from vmm.trap.frames import FrameControl
from vmm.trap.guard import StepGuard
from vmm.trap.refusal import GENERAL_PROTECTION, Refusals
from vmm.trap.sub_pages import SubPages
from vmm.trap.virtualization import VIRTUALIZATION_EXCEPTION, VirtualizationExceptions

if TYPE_CHECKING:
    from vmm.monitors.watcher import Watcher

#: Trapped writes to one frame after which the adaptive policy opens a window.
HOT_FRAME: Final = 16
#: Trapped reads of one after which it grants reads: fewer, since a read says less.
READ_OFTEN: Final = 4

_ALLOWED: Final = PERMISSION_MASK | USER_EXECUTE
_READS: Final = ("step", "grant", "adaptive")
_WRITES: Final = ("step", "window", "adaptive", "attribute")
#: What makes windows of hot frames only.
_ADAPTIVE: Final = ("adaptive", "attribute")


@frozen(slots=True)
class TrapPolicy:
    """How reads of and writes to code frames are answered (see the module's table)."""

    reads: str = "step"
    writes: str = "step"

    def __attrs_post_init__(self) -> None:
        for value, choices, name in ((self.reads, _READS, "reads"), (self.writes, _WRITES, "writes")):
            if value not in choices:
                raise OptionError(f"{name} = {value!r}", where="policy", fix=f"choose one of {', '.join(choices)}")


class UnmappedAccess(Exception):  # noqa: N818 - for the processor, which ends the run
    """The guest reached for guest-physical memory that does not exist."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation)
        self.violation = violation


class DeniedAccess(UnmappedAccess):
    """A view, or an EPT entry above the page's own, forbids the access: only whoever wanted that can mend it."""


@define(slots=True)
class Trap:
    """Answers EPT violations of one vCPU."""

    policy: TrapPolicy
    frames: Frames
    control: FrameControl
    door: Door
    mmu: Mmu
    instruction: CurrentInstruction
    guard: StepGuard
    reporter: Reporter
    refusals: Refusals
    #: None on a processor without EPT-violation #VE.
    exceptions: VirtualizationExceptions | None = None
    #: Whether what a view forbids, and no handler wants, becomes a #GP of the guest instead of the end of the run.
    denials_fault: bool = False
    #: Under strict staleness told of each stepped instruction: what it may have written, from before, and its address.
    stepped: Callable[[Mapping[int, bytes], int], None] | None = None
    #: Judges stores to guarded frames; None without sub-page write permissions.
    sub_pages: SubPages | None = None
    #: Tells monitors of what instructions do; None while there are none.
    watcher: Watcher | None = None
    #: Devices in guest-physical memory; None without any.
    devices: DeviceMemory | None = None

    def answer(self, violation: Violation) -> Stop | Event | None:
        """Answer one violation of the free-running engine.

        Returns None to go on, a ``Stop`` if a stepped instruction ended in something for the run loop to answer,
        or an ``Event`` to deliver. Raises ``UnmappedAccess``.
        """
        if self._is_stepped(violation):
            return self.step(violation)
        decision = self._report(violation, modifies=self._modifies(violation))
        if decision is not None:
            return decision if isinstance(decision, Event) else None
        if self.denials_fault and self.is_denied(violation):
            return GENERAL_PROTECTION
        frame = self._frame_of(violation)
        if violation.access == FETCH:
            return self._fetched(frame, violation)
        if not violation.final:
            return self._walked(frame, violation)
        if violation.access == READ:
            self.control.grant_reads(frame, "code read")
            return None
        return self._open_window(frame, violation)

    def is_denied(self, violation: Violation) -> bool:
        """Whether a view is against an access, whatever the state of the frame."""
        return self.mmu.view.forbids(violation.gpa, violation.needed)

    def answer_use(self, use: Unjudged) -> Event | Stop | None:
        """Answer the first use of a permission under a W^X policy; as ``answer``."""
        return self.refusals.of_use(use)

    def step(self, violation: Violation | None = None) -> Stop | Event | None:
        """Let one instruction execute, opening what it needs; ``violation`` is the one that is due already.

        Returns None if it completed, else what the run loop has to answer.
        """
        if self.watcher is not None:
            return self.watcher.step(violation)
        return self.step_unwatched(violation)

    def step_unwatched(self, violation: Violation | None) -> Stop | Event | None:
        """``step``, with nobody told that the instruction is about to execute, or has."""
        guard = self.guard
        guard.begin(arrived=violation is not None)
        try:
            outcome = self._let_through(violation)
            if self.watcher is not None:
                self.watcher.look(outcome)
        finally:
            entries = guard.close()
        if self.stepped is not None:
            self.stepped(guard.vcpu.step_memory.undo, guard.vcpu.step_memory.pc)
        try:
            if guard.exited and (outcome is Stop.STEPPED or guard.trapped(outcome)):
                self.reporter.count(ExitReason.MTF)
                if self.reporter.observed:
                    self.reporter.exit(Mtf(rip=guard.vcpu.context.pc))
        finally:
            guard.publish(entries)
        if self.devices is not None and not isinstance(outcome, Event | None) and guard.is_complete(outcome):
            self.devices.complete(guard.start)
        return None if outcome is Stop.STEPPED else outcome

    def _let_through(self, violation: Violation | None) -> Stop | Event | None:
        """Attempt the instruction until nothing refuses it any more."""
        refusal: Refusal | None = violation
        while True:
            if isinstance(refusal, Violation):
                if self._guest_forbids(refusal):
                    return Stop.REFUSED
                decision = self._admit(refusal)
            elif isinstance(refusal, Watched) and self.watcher is not None:
                decision = self.watcher.announce()
            else:
                decision = self.answer_use(refusal) if isinstance(refusal, Unjudged) else None
            if decision is not None:
                return decision
            stop = self.guard.attempt()
            refusal = self.mmu.refusal
            if stop is not Stop.REFUSED or not isinstance(refusal, Violation | Unjudged | Watched):
                return stop
            if self.watcher is not None:
                self.watcher.refused()

    def _is_stepped(self, violation: Violation) -> bool:
        """Whether the answer is to let one instruction through."""
        host = self._host_of(violation)
        if host is None:
            return self._is_of_device(violation)
        if not violation.final or violation.access == FETCH:
            return False
        frame = self.frames.at(host)
        if violation.access == READ:
            often = frame.reads >= READ_OFTEN
            return self.policy.reads == "step" or (self.policy.reads == "adaptive" and not often)
        return frame.state is not FrameState.CODE or not self._wants_window(frame)

    def _admit(self, violation: Violation) -> Event | Stop | None:
        """Open what a violation in a step asks for; an event to deliver instead, or ``Stop.ASKED`` to give up."""
        verdict = None if self.sub_pages is None or self._is_code(violation) else self.sub_pages.judge(violation)
        if verdict is not None and verdict[0] is not SubPageVerdict.FORBIDDEN:
            return self._admit_sub_pages(violation, *verdict)
        modifies = self._modifies(violation)
        decision = self._report(violation, modifies=modifies)
        if decision is not None:
            return decision if isinstance(decision, Event) else Stop.ASKED
        if self.denials_fault and self.is_denied(violation):
            return GENERAL_PROTECTION
        return self._open(violation, writes=violation.access == WRITE or modifies)

    def _open(self, violation: Violation, *, writes: bool) -> Event | Stop | None:
        """Open a frame, or a device, for the one instruction; as ``_admit``."""
        if self.devices is not None and self._is_of_device(violation):
            self.devices.admit(violation.page, writes=writes)
            return None
        frame = self._frame_of(violation)
        if violation.access == FETCH:
            return self._fetched(frame, violation)
        if not violation.final:
            return self._walked(frame, violation)
        if writes and frame.state is FrameState.SEALED:
            return self.refusals.of_violation(frame, violation, WRITE)
        if writes and self.refusals.keeps_wx and frame.lasting is FrameState.CODE:
            return self._open_window(frame, violation)
        if frame.state is FrameState.SEALED:
            self.control.grant_reads(frame, "read of sealed code")
        else:
            frame.traps += writes
            frame.reads += not writes
            self.guard.open(frame, WRITE if writes else READ)
        return None

    def _admit_sub_pages(self, violation: Violation, verdict: SubPageVerdict, gpa: int) -> Event | Stop | None:
        """A store that the sub-page permission table allows, without an exit, or says nothing about."""
        if self.sub_pages is None or verdict is not SubPageVerdict.ALLOWED:
            return None if self.sub_pages is None else self.sub_pages.event(violation, verdict, gpa)
        self.guard.open(self._frame_of(violation), WRITE, exited=False)
        return None

    def _frame_of(self, violation: Violation) -> Frame:
        host = self._host_of(violation)
        if host is None:
            raise UnmappedAccess(violation)
        if not self.mmu.view.can_allow(violation.gpa, violation.needed):
            raise DeniedAccess(violation)
        return self.frames.at(host)

    def _is_of_device(self, violation: Violation) -> bool:
        """Whether it is a load or store to a device: there is no memory at the GPA."""
        if self.devices is None or not violation.final or violation.access == FETCH:
            return False
        return self._host_of(violation) is None and self.devices.bus.holds(violation.gpa)

    def _is_code(self, violation: Violation) -> bool:
        host = self._host_of(violation)
        return host is not None and self.frames.at(host).lasting not in (FrameState.DATA, FrameState.WINDOW)

    def _host_of(self, violation: Violation) -> int | None:
        return violation.leaf or self.mmu.view.ept.host_page(violation.gpa)

    # Answers

    def _fetched(self, frame: Frame, violation: Violation) -> Event | Stop | None:
        refused = self.refusals.of_violation(frame, violation, FETCH)
        if refused is not None:
            return refused
        cause = "first fetch" if frame.state is FrameState.DATA else "fetch"
        sealed = frame.state is FrameState.SEALED
        self.control.move(frame, FrameState.SEALED if sealed else FrameState.CODE, cause)
        return None

    def _walked(self, frame: Frame, violation: Violation) -> Event | Stop | None:
        """The guest keeps paging structures in a code frame: the walk may read there, and write by the door."""
        if violation.access == READ:
            self.control.grant_reads(frame, "page walk")
            return None
        try:
            with self.mmu.structures.reached_by(self.door):
                self.mmu.walk_again(violation.page)
        except SealedFrame as sealed:
            return self.refusals.of_walk(sealed.gpa)
        except PagingStructureViolation:
            return None  # by another entry: the guest's own walk will come to it
        return None

    def _wants_window(self, frame: Frame) -> bool:
        """Whether to open a window; never for a frame that must be fetched from to get at the store (a livelock).

        A W^X policy refuses a store to such a frame, so that it need not ask.
        """
        if self.refusals.keeps_wx:
            return True
        wanted = self.policy.writes == "window" or (self.policy.writes in _ADAPTIVE and frame.traps >= HOT_FRAME)
        if not wanted or self.instruction.lies_in(frame) or self._is_fetched_with_store(frame):
            return False
        return self.policy.writes != "attribute" or not self.mmu.aliases.may_execute(frame)

    def _is_fetched_with_store(self, frame: Frame) -> bool:
        """Whether the block that the store is in ends in the frame: it is fetched as a whole, before the store."""
        host = self.mmu.fetch_host(self.guard.vcpu.context.pc)
        return host is not None and self.control.shares_block(frame, host)

    def _open_window(self, frame: Frame, violation: Violation) -> Event | Stop | None:
        refused = self.refusals.of_violation(frame, violation, WRITE)
        if refused is not None:
            return refused
        self.control.open_window(frame, "hot frame" if self.policy.writes in _ADAPTIVE else "store")
        return None

    def close_windows(self) -> None:
        """Journal what was written through the windows that are still open, at the end of a run."""
        state = FrameState.DATA if self.refusals.keeps_wx else FrameState.CODE
        for frame in self.frames:
            if frame.state is FrameState.WINDOW:
                self.control.move(frame, state, "end of run")

    # Reports

    def _modifies(self, violation: Violation) -> bool:
        """Whether a refused read is the first half of a read-modify-write."""
        if violation.access != READ or not violation.final:
            return False
        return self.instruction.modifies(self.instruction.faulting_address(violation.page, READ))

    def _is_of_modification(self, violation: Violation, address: int) -> bool:
        """Whether a refused store is the second half of a read-modify-write, which is both, whichever is refused."""
        return violation.access == WRITE and self.instruction.modifies(address)

    def _guest_forbids(self, violation: Violation) -> bool:
        """Whether a read-modify-write is to a page that the guest itself may not write: its #PF comes first."""
        return self._modifies(violation) and self.mmu.forbids_write(violation.page)

    def _report(self, violation: Violation, *, modifies: bool) -> Event | bool | None:
        """Count the exit and show it; what a handler decides. Or a #VE, which is no exit."""
        exceptions = self.exceptions
        if exceptions is not None and exceptions.converts(violation):
            exceptions.save(*self._facts(violation, modifies=modifies))
            self.reporter.charge()
            return VIRTUALIZATION_EXCEPTION
        self.reporter.count(ExitReason.EPT_VIOLATION)
        if not self.reporter.observed:
            return None
        qualification, gpa, gva = self._facts(violation, modifies=modifies)
        exit_ = EptViolation(self.instruction.pc, qualification, gpa, gva, self.mmu.view.shown)
        decision = self.reporter.exit(exit_)
        return True if self.reporter.stopped else decision

    def _facts(self, violation: Violation, *, modifies: bool) -> tuple[int, int, int]:
        """Exit qualification, guest-physical and guest-linear address."""
        access = violation.access if violation.linear_access is None else violation.linear_access
        address = self.instruction.faulting_address(violation.page, access)
        both = violation.updates or (violation.final and self._is_of_modification(violation, address))
        qualification = encode(
            read=violation.access == READ or both,
            write=violation.access == WRITE or modifies or both,
            fetch=violation.access == FETCH,
            allowed=violation.leaf & _ALLOWED,
            final=violation.final,
            advanced=violation.advanced,
        )
        offset = address & PAGE - 1 if violation.final else 0
        return qualification, violation.gpa + offset, address
