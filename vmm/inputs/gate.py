"""The place that every input of one machine passes, and where whoever records it listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmm.cpu.events import Event
from vmm.errors import OptionError
from vmm.inputs.kind import Input
from vmm.inputs.moment import Moment, Place
from vmm.inputs.processor import Decision, PortRead, SetRegisters

if TYPE_CHECKING:
    from vmm.cpu.context import Context
    from vmm.devices import Device

#: Called with each input before it takes effect.
Listener = Callable[[Input, Moment], None]
#: Answers an IN (port, size) in place of all devices; None: nobody is there.
PortSource = Callable[[int, int], int | None]


class Inputs:
    """The place that every input of one machine passes."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        #: In a replay, where the values of IN come from.
        self.source: PortSource | None = None
        #: The registers that a handler may change: those of each vCPU.
        self.contexts: list[Context] = []
        #: Virtual time in nanoseconds, on a machine whose boundaries between instructions can be told by it.
        self.clock: Callable[[], int] | None = None
        self._depth = 0
        self._place = Place.RECORD
        self._unrepeatable = False

    def note(self, given: Input) -> None:
        """An input is about to take effect; raises ``OptionError`` where a recording could not tell the place of it."""
        if self.listener is not None:
            if self._unrepeatable:
                raise _unrepeatable(given.name)
            time = None if self.clock is None or self._place is not Place.BOUNDARY else self.clock()
            self.listener(given, Moment(self._depth, self._place, time))

    @contextmanager
    def during(self, given: Input) -> Iterator[None]:
        """An input takes effect in the ``with`` block, and may cause records, at which others come."""
        self.note(given)
        self._depth += 1
        try:
            with self.at(Place.RECORD):
                yield
        finally:
            self._depth -= 1

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """What is noted in the ``with`` block takes effect at this place."""
        before, self._place = self._place, place
        try:
            yield
        finally:
            self._place = before

    @contextmanager
    def unrepeatable(self) -> Iterator[None]:
        """Nothing may reach a machine that is recorded in the ``with`` block, which is at no record of the run."""
        before, self._unrepeatable = self.registers(), True
        try:
            yield
            self.registers_after(before)
        finally:
            self._unrepeatable = False

    def read(self, port: int, size: int, device: Device | None) -> int | None:
        """What an IN gets from outside; None if there is neither a device nor a recorded answer."""
        if self.source is not None:
            value = self.source(port, size)
        else:
            value = None if device is None else device.read(port, size)
        if value is not None:
            value &= (1 << 8 * size) - 1
            self.note(PortRead(port, size, value))
        return value

    def decided(self, decision: Event | bool) -> None:  # noqa: FBT001 - the value that a handler returned
        """A handler has decided about the exit that is under way."""
        self.note(Decision(decision if isinstance(decision, Event) else None))

    def registers(self) -> list[bytes]:
        """The registers before somebody may change them, for ``registers_after``; empty if nobody wants to know."""
        return [] if self.listener is None else [context.snapshot() for context in self.contexts]

    def registers_after(self, before: list[bytes]) -> None:
        """Note which registers were changed since ``registers``."""
        for vcpu, old in enumerate(before):
            changed = self.contexts[vcpu].changed_since(old)
            if changed:
                self.note(SetRegisters(vcpu, changed))


def _unrepeatable(what: str) -> OptionError:
    where, fix = "what a monitor does", "only look, or record the run without it"
    return OptionError(f"an input ({what}) at no record of the trace", where=where, fix=fix)
