"""Exits are counted here, shown to observers, and put before the handlers that a host program registered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from vmm.cpu.events import Event
from vmm.exits import Exit, ExitReason, Record

E = TypeVar("E", bound=Exit)
#: Called with each exit of its type before the default answer. A returned ``Event`` is delivered instead of that
#: answer; True means that the exit is dealt with, and the guest goes on as it is.
Handler = Callable[[E], "Event | bool | None"]
Observer = Callable[[Record], None]


class Reporter:
    """Counts every exit; makes records only if somebody wants them (``observed``)."""

    def __init__(self, limit: int) -> None:
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
        if self.total > self.limit:
            self.over_budget = True

    def emit(self, record: Record) -> None:
        """Show a record to the observers."""
        for observer in self._observers:
            observer(record)

    def exit(self, record: Exit) -> Event | bool | None:
        """Show an exit to the observers, then to its handlers; what the first handler decides."""
        for observer in self._observers:
            observer(record)
        if self._handlers:
            for handler in self._handlers.get(type(record), ()):
                decision = handler(record)
                if decision is not None and decision is not False:
                    return decision
        return None
