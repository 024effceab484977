"""Exits are counted here, shown to observers, and put before the handlers that a host program registered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from attrs import evolve

from vmm.cpu.events import Event
from vmm.errors import OptionError
from vmm.exits import (
    EptMisconfiguration,
    EptViolation,
    ExceptionExit,
    Exit,
    ExitReason,
    SppEvent,
    Vmcall,
    Vmfunc,
)
from vmm.inputs import Inputs
from vmm.records import Record

E = TypeVar("E", bound=Exit)
#: Called with each exit of its type before the default answer. A returned ``Event`` is delivered instead of that
#: answer; True means that the exit is dealt with, and the guest goes on as it is.
Handler = Callable[[E], "Event | bool | None"]
Observer = Callable[[Record], None]
#: Exits whose instruction has not executed, so that an event can be delivered instead of it.
REPLACEABLE: Final = (EptViolation, ExceptionExit, Vmcall, Vmfunc, EptMisconfiguration, SppEvent)


class Reporter:
    """Counts every exit; makes records only if somebody wants them (``observed``)."""

    def __init__(self, limit: int, inputs: Inputs) -> None:
        self.counts: Counter[ExitReason] = Counter()
        self.observed = False
        #: Whether observers or handlers may act on the guest, so that exits must be at exact boundaries.
        self.interactive = False
        #: Exits so far; a measure of virtual time, too.
        self.total = 0
        #: Exits that the guest may take, and whether it has used them up.
        self.limit = limit
        self.over_budget = False
        #: Whether the host has ended the run: an access that is due at an exit is not let through any more.
        self.stopped = False
        #: The vCPU at work, which records are to name; None on a machine that has only one.
        self.vcpu: int | None = None
        self._inputs = inputs
        self._charged = 0
        self._observers: list[Observer] = []
        self._handlers: dict[type[Exit], list[Handler[Any]]] = {}

    def observe(self, observer: Observer, *, acts: bool) -> None:
        """Show every record to an observer, in order."""
        self._observers.append(observer)
        self.observed = True
        self.interactive |= acts

    def handle(self, kind: type[E], handler: Handler[E]) -> None:
        """Put every exit of a type before a handler."""
        self._handlers.setdefault(kind, []).append(handler)
        self.observed = self.interactive = True

    def count(self, reason: ExitReason) -> None:
        """One more exit."""
        self.counts[reason] += 1
        self.total += 1
        if self.total + self._charged > self.limit:
            self.over_budget = True

    def charge(self) -> None:
        """Something that is no exit is reported: it counts against the budget of exits, so that a run ends."""
        self._charged += 1
        if self.total + self._charged > self.limit:
            self.over_budget = True

    @contextmanager
    def of_vcpu(self, number: int) -> Iterator[None]:
        """Have records name another vCPU than the one at work, if they name any."""
        at_work = self.vcpu
        self.vcpu = None if at_work is None else number
        try:
            yield
        finally:
            self.vcpu = at_work

    def emit(self, record: Record) -> None:
        """Show a record to the observers."""
        if self.vcpu is not None:
            record = evolve(record, vcpu=self.vcpu)
        self._show(record)

    def exit(self, record: Exit) -> Event | bool | None:
        """Show an exit to the observers, then to its handlers; what the first handler decides.

        Raises ``OptionError`` for a decision that this exit does not leave to handlers.
        """
        if self.vcpu is not None:
            record = evolve(record, vcpu=self.vcpu)
        if not self.interactive:
            self._show(record)
            return None
        before = self._inputs.registers()
        self._show(record)
        decision = self._decision(record)
        self._inputs.registers_after(before)
        if decision is not None:
            self._inputs.decided(decision)
        return decision

    def _show(self, record: Record) -> None:
        for observer in self._observers:
            observer(record)

    def _decision(self, record: Exit) -> Event | bool | None:
        for handler in self._handlers.get(type(record), ()):
            decision = handler(record)
            if decision is not None and decision is not False:
                return _checked(decision, record)
        return None


def _checked(decision: object, record: Exit) -> Event | bool:
    if decision is True or (isinstance(decision, Event) and isinstance(record, REPLACEABLE)):
        return decision
    if isinstance(decision, Event):
        what, fix = f"an event in place of {record.reason.name}", "hand it to Machine.inject and return None"
    else:
        what, fix = f"{decision!r} for {record.reason.name}", "return None, True or an Event"
    raise OptionError(what, where="what a handler returned", fix=fix)
