"""Tells monitors what the instructions of one vCPU are about to do, and have done.

An instruction that somebody is to be asked about is *rehearsed* first: the stepping engine executes it, so that its
accesses are known exactly, and everything is put back. If nobody objects it is executed.
"""

from __future__ import annotations

from attrs import define, field

from vmm.cpu.engine import Stop
from vmm.cpu.events import Event
from vmm.errors import OptionError
from vmm.inputs import Inputs
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frames
from vmm.monitors.accesses import accesses_of, before_and_after
from vmm.monitors.monitor import Monitor, MonitoredAccess
from vmm.monitors.table import Monitors
from vmm.reporter import Reporter
from vmm.translation import Span
from vmm.trap.policy import Trap
from vmm.vcpu import VirtualCpu

#: An access and those who are to be told of it.
_Told = tuple[MonitoredAccess, list[Monitor]]


@define(slots=True, eq=False)
class Watcher:
    """Stands around the steps of one vCPU's trap."""

    monitors: Monitors
    vcpu: VirtualCpu
    trap: Trap
    memory: GuestMemory
    frames: Frames
    reporter: Reporter
    inputs: Inputs
    #: Whether those who want to be asked about the accesses of this instruction have been.
    _asked: bool = field(default=False, init=False)
    #: What the instruction has done.
    _done: list[_Told] = field(factory=list, init=False)
    #: The linear address of a string instruction in the middle of its iterations.
    _iterating: int | None = field(default=None, init=False)
    _executed: list[_Told] = field(factory=list, init=False)

    def step(self, violation: object) -> Stop | Event | None:
        """Let one instruction execute, as ``Trap.step`` does, and tell of it."""
        self._asked, self._done = False, []
        if self._iterating != self.vcpu.context.pc:
            self._iterating, self._executed = None, self._fetched()
            decision = self._ask(self._executed)
            if decision is not None:
                return decision
            if any(monitor.before for _, monitors in self._executed for monitor in monitors):
                violation = None  # what it is going to access may be something else now
        outcome = self.trap.step_unwatched(violation)  # type: ignore[arg-type]  # a Violation, or None
        for access, monitors in self._done:
            self._tell(access, monitors)
        return outcome

    def announce(self) -> Event | Stop | None:
        """The instruction is about to access a frame for which somebody wants to be asked; None to let it."""
        step = self.vcpu.step_memory
        if not self._asked:
            step.lets_through = True
            with self.trap.guard.rehearsal() as (stop, completes):
                coming = self._accesses(known=stop is not Stop.EXACT) if completes else None
            if coming is not None:
                self._asked = True
                decision = self._ask(coming)
                if decision is not None:
                    return decision
            step.begin(arrived=False)
        step.lets_through = True
        return None

    def refused(self) -> None:
        """An attempt needs something else first: accesses that nobody was asked about are not to be let through."""
        self.vcpu.step_memory.lets_through = self._asked

    def look(self, outcome: Stop | Event | None) -> None:
        """An attempt is over; if the instruction is complete, note what it did."""
        if not isinstance(outcome, Stop) or not self.trap.guard.is_complete(outcome):
            self._iterating = None
            return
        pc, start = self.vcpu.context.pc, self.trap.guard.start
        self._iterating = pc if pc == start and self.vcpu.step_memory.decoded.repeats else None
        executed = self._executed if self._iterating is None else []
        self._done = [*executed, *self._accesses(known=True)]

    def _fetched(self) -> list[_Told]:
        """The instruction at RIP as an access, if its execution is monitored."""
        instruction, mmu = self.vcpu.instruction, self.vcpu.mmu
        pc, decoded = instruction.pc, instruction.decoded
        places: list[Span] = []
        done, size = 0, decoded.length or 1
        while done < size:
            host = mmu.fetch_host(pc + done)
            if host is None:
                return []
            length = min(size - done, PAGE - host % PAGE)
            places.append((self.memory.home(host), length))
            done += length
        told = [
            monitor
            for monitor in self.monitors.of("x", places)
            if not monitor.at_start or monitor.spans[0][0] == places[0][0]
        ]
        if not told:
            return []
        gpa = self.frames.at(places[0][0]).gpas[0] | pc % PAGE
        code = instruction.code[: decoded.length]
        return [(self._access("x", pc, gpa, size, code, None), told)]

    def _accesses(self, *, known: bool) -> list[_Told]:
        """What the last step read and wrote of monitored bytes; whether what it wrote is ``known``."""
        found = []
        for access in accesses_of(self.vcpu.step_memory, self.vcpu.stepping):
            places = access.places()
            told = self.monitors.of(access.kind, places)
            if told:
                old, new = before_and_after(places, self.vcpu.step_memory, self.memory)
                after = new if known and access.kind == "w" else None
                found.append((self._access(access.kind, access.gva, access.gpa, access.size, old, after), told))
        return found

    def _access(self, kind: str, gva: int, gpa: int, size: int, old: bytes, new: bytes | None) -> MonitoredAccess:
        if kind == "x":
            start, length = gva, len(old)
        else:
            start, length = self.trap.guard.start, self.vcpu.step_memory.decoded.length
        return MonitoredAccess(kind, gva, gpa, size, old, new, start, length, self.vcpu.number)

    def _ask(self, coming: list[_Told]) -> Event | Stop | None:
        """Ask all who want to be; what the first decides who does not let it happen."""
        context = self.vcpu.context
        for access, monitors in coming:
            for monitor in monitors:
                if monitor.before is None or not monitor.wants(access):
                    continue
                with self.inputs.unrepeatable():
                    pc = context.pc
                    decision = _checked(monitor.before(access))
                    if decision is not None:
                        self.inputs.decided(decision)
                if isinstance(decision, Event):
                    return decision
                if decision is True or self.reporter.stopped or context.pc != pc:
                    self.reporter.charge()  # so that a guest that never gets on comes to an end
                    return Stop.ASKED
        return None

    def _tell(self, access: MonitoredAccess, monitors: list[Monitor]) -> None:
        for monitor in monitors:
            if monitor.wants(access):
                monitor.hits += 1
                if monitor.after is not None:
                    with self.inputs.unrepeatable():
                        monitor.after(access)


def _checked(decision: object) -> Event | bool | None:
    if decision is None or decision is True or isinstance(decision, Event):
        return decision
    what = f"{decision!r} before an access"
    raise OptionError(what, where="what a monitor returned", fix="return None, True or an Event")
