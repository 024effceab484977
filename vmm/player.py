"""Whoever acted on a recorded machine, from its trace: each input again at its moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attrs import frozen

from vmm.cpu.events import Event
from vmm.errors import InputError, OptionError
from vmm.exits import Exit
from vmm.inputs import Decision, Input, Moment, Place, PortRead, parse
from vmm.machine import Machine
from vmm.records import Record
from vmm.reporter import REPLACEABLE
from vmm.trace.reading import TraceReader

RECORD_AGAIN: Final = "record the run again with `vmm run --trace`"


@frozen(slots=True)
class _Due:
    """An input of the trace with its moment; ``at`` is its line."""

    at: int
    seq: int
    moment: Moment
    given: Input

    @property
    def asked_for(self) -> bool:
        """Whether it is an answer, which is given when the machine asks."""
        return isinstance(self.given, PortRead | Decision)


class Player:
    """Gives a machine the inputs of a trace: each at the record that it came after, in order.

    What the machine does not ask for, or asks for at another place, is left; the comparison of the traces shows it.
    Implements ``vmm.pc.Outside``: what came between two records comes at the first boundary at which virtual time
    is what it was; so does a boundary that it passes, too late, and the comparison shows that, too.
    """

    def __init__(self, path: Path, machine: Machine) -> None:
        self._machine = machine
        self._reader = TraceReader(path)
        self._inputs = self._read()
        self._next = next(self._inputs, None)
        #: Records so far, and how many inputs are being carried out around the one that is next.
        self._count = 0
        self._depth = 0

    def attach(self, *, acts: bool) -> None:
        """Take part in the machine's run; ``acts`` as for ``Machine.observe``."""
        machine = self._machine
        machine.inputs.source = self._answer
        machine.observe(self._see, acts=acts)
        machine.on_output(lambda _data: self.perform(Place.OUTPUT))
        if machine.pc is not None:
            machine.pc.outside = self
        if acts:
            for kind in Exit.__subclasses__():
                machine.on(kind)(self._decide)

    def close(self) -> None:
        """Close the trace."""
        self._reader.close()

    def perform(self, place: Place = Place.RECORD) -> None:
        """Do what was done at this place."""
        while (due := self._due(place)) is not None and not due.asked_for:
            self._advance()
            self._depth += 1
            try:
                due.given.apply(self._machine)
            except OptionError as problem:
                raise self._impossible(due, problem.what) from None
            finally:
                self._depth -= 1

    # vmm.pc.Outside

    @property
    def waiting(self) -> bool:
        """Whether the next input is due at a boundary now."""
        return self._due(Place.BOUNDARY) is not None

    def poll(self) -> bytes:
        """Do what was done at this boundary; nobody types."""
        self.perform(Place.BOUNDARY)
        return b""

    def sleep(self, nanoseconds: int | None) -> int | None:
        """To the next alarm, or to the next input if that came before."""
        due = self._following(Place.BOUNDARY)
        if due is None:
            return nanoseconds
        rest = self._rest(due)
        return rest if nanoseconds is None else min(rest, nanoseconds)

    # At records

    def _see(self, _record: Record) -> None:
        self._count += 1
        self.perform()

    def _decide(self, record: Exit) -> Event | bool | None:
        due = self._due(Place.RECORD)
        if due is None or not isinstance(due.given, Decision):
            return None
        self._advance()
        if due.given.event is None:
            return True
        if not isinstance(record, REPLACEABLE):
            raise self._impossible(due, f"an event in place of {record.reason.name}")
        return due.given.event

    def _answer(self, port: int, size: int) -> int | None:
        due = self._due(Place.RECORD)
        if due is None or not isinstance(due.given, PortRead) or (due.given.port, due.given.size) != (port, size):
            return None
        self._advance()
        return due.given.value

    # The inputs of the trace

    def _due(self, place: Place) -> _Due | None:
        """The next input, if it is to be now."""
        due = self._following(place)
        return None if due is None or self._rest(due) else due

    def _following(self, place: Place) -> _Due | None:
        """The next input, if it comes between the last record and the next, at a place like this."""
        due = self._next
        if due is None or due.seq != self._count:
            return None
        return due if (due.moment.depth, due.moment.place) == (self._depth, place) else None

    def _rest(self, due: _Due) -> int:
        """Virtual time until it, in nanoseconds."""
        time, clock = due.moment.time, self._machine.inputs.clock
        return 0 if time is None or clock is None else max(0, time - clock())

    def _advance(self) -> None:
        self._next = next(self._inputs, None)

    def _read(self) -> Iterator[_Due]:
        for line in self._reader.lines():
            if line.kind == "input":
                yield _Due(line.at, line.seq, Moment.parse(line.object), parse(line.object))

    def _impossible(self, due: _Due, what: str) -> InputError:
        where = f"{self._reader.name}:{due.at}"
        return InputError(f"an input that no run could have: {what}", where=where, fix=RECORD_AGAIN)
