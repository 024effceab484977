"""Scripts at work: every record of a run is held against a script, and what the script wants is done."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from vmm.cpu.events import Event, EventType, Vector
from vmm.ept import Permission
from vmm.errors import OptionError
from vmm.exits import EptViolation, ExceptionExit, Exit, IoInstruction
from vmm.records import Record
from vmm.trace.actions import ActionError
from vmm.trace.matcher import Matcher, Verdict
from vmm.trace.syntax import AnyOrder, Either, Expect, Node, Repeat, Section

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.machine import Machine
    from vmm.trace.script import Script

#: Exceptions that push an error code (SDM vol. 3, table 6-1).
_WITH_ERROR_CODE: Final = frozenset(
    {Vector.DF, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.AC, Vector.CP}
)
_FIRST_INTERRUPT: Final = 32
#: Exits whose instruction has not executed: an event that is injected at one comes instead of it.
_BEFORE_INSTRUCTION: Final = (EptViolation, ExceptionExit)


class MachineActions:
    """Implements ``vmm.trace.actions.Actions`` at the record that is being reported."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._record: Record | None = None
        #: What to deliver instead of the instruction that caused the exit.
        self._instead: Event | None = None

    def attach(self) -> None:
        """Take part in the exits at which an event can still come before the instruction."""
        for kind in _BEFORE_INSTRUCTION:
            self._machine.on(kind)(self._decide)

    def begin(self, record: Record) -> None:
        """The actions that follow belong to this record."""
        self._record = record

    def inject(self, vector: int, error_code: int | None) -> None:
        """Deliver an event at the next VM entry: below 32 an exception or NMI, else an external interrupt."""
        event = _event(vector, error_code)
        if isinstance(self._record, _BEFORE_INSTRUCTION):
            self._instead = event
        else:
            self._machine.inject(event)

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest-physical memory as the host."""
        try:
            self._machine.write(gpa, data)
        except OptionError as problem:
            raise ActionError(problem.what) from None

    def protect(self, gpa: int, length: int, access: str) -> None:
        """Change what the EPT allows for whole pages."""
        try:
            self._machine.protect(gpa, length, Permission.parse(access))
        except OptionError as problem:
            raise ActionError(f"{problem.what}: {problem.fix}") from None

    def approve(self, gpa: int, length: int) -> None:
        """Let frames be executed as they are."""
        try:
            self._machine.approve(gpa, length)
        except OptionError as problem:
            raise ActionError(f"{problem.what}: {problem.fix}") from None

    def answer(self, value: int) -> None:
        """Let the IN at this exit read ``value``."""
        if not isinstance(self._record, IoInstruction) or self._record.direction != "in":
            raise ActionError("only an IN can be answered, and this is none")
        self._machine.answer(value)

    def stop(self) -> None:
        """End the run."""
        self._machine.stop()

    def _decide(self, _exit: Exit) -> Event | None:
        event, self._instead = self._instead, None
        return event


class ScriptRun:
    """One run of a machine under a script.

    Make it after all other observers, so that these see a record before what the script does about it.
    """

    def __init__(self, machine: Machine, script: Script, *, matcher: type[Matcher] = Matcher) -> None:
        self._machine = machine
        self._acts = has_actions(script)
        self._actions = MachineActions(machine)
        self.matcher: Final = matcher(script, self._actions)
        self._waiting: deque[Record] = deque()
        self._busy = False
        machine.observe(self._observe, acts=self._acts)
        if self._acts:
            self._actions.attach()

    def finish(self) -> Verdict:
        """Say whether the script holds, now that the run is over."""
        return self.matcher.finish()

    def _observe(self, record: Record) -> None:
        """Hand a record on; one that an action itself causes waits until that action is done."""
        self._waiting.append(record)
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting:
                self._feed(self._waiting.popleft())
        finally:
            self._busy = False
        if self._acts and self.matcher.failed:
            # The guest would go on without the answers that it needs.
            self._machine.stop()

    def _feed(self, record: Record) -> None:
        self._actions.begin(record)
        self.matcher.feed(record.to_json())


def has_actions(script: Script) -> bool:
    """Whether the script does anything to the guest."""
    return _act([script.program.root])


def _act(nodes: Iterable[Node]) -> bool:
    return any(map(_acts, nodes))


def _acts(node: Node) -> bool:
    match node:
        case Expect():
            return bool(node.actions)
        case Repeat():
            return _act(node.body)
        case AnyOrder():
            return _act(node.members)
        case Either():
            return any(map(_act, node.branches))
        case Section():
            return any(watch.actions for watch in node.watches) or _act(node.body)


def _event(vector: int, error_code: int | None) -> Event:
    if vector >= _FIRST_INTERRUPT:
        kind = EventType.EXTERNAL_INTERRUPT
    elif vector == Vector.NMI:
        kind = EventType.NMI
    else:
        kind = EventType.HARDWARE_EXCEPTION
    if vector in _WITH_ERROR_CODE:
        return Event(vector, kind, error_code or 0)
    if error_code is not None:
        raise ActionError(f"vector {vector} has no error code")
    return Event(vector, kind)
