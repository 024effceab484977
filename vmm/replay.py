"""Having a recorded run again: the same guest, given the inputs of its trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import attrs
from attrs import evolve, frozen

from vmm.cpu.events import Event
from vmm.errors import InputError, OptionError
from vmm.exits import Exit, Record
from vmm.guest.ept import ept_from
from vmm.guest.manifest_reader import policy_from
from vmm.inputs import Decision, Input, PortRead, parse
from vmm.machine import Machine, RunOptions
from vmm.recording import digests, record
from vmm.reporter import REPLACEABLE
from vmm.trace.comparison import Comparison
from vmm.trace.header import Header
from vmm.trace.reading import BETWEEN, TraceLine, TraceReader

if TYPE_CHECKING:
    from vmm.guest.loader import Guest
    from vmm.trace.comparison import Difference
    from vmm.trace.sink import Output
    from vmm.trace.whole import WholeTrace

_RECORD_AGAIN: Final = "record the run again with `vmm run --trace`"


def header_of(trace: WholeTrace) -> Header:
    """The header of a trace that is to be replayed; raises ``InputError`` for one that says too little."""
    try:
        return Header.parse(trace.header)
    except ValueError as problem:
        raise InputError(f"the header has {problem}", where=f"{trace.path}:1", fix=_RECORD_AGAIN) from None


def check_guest(trace: WholeTrace, header: Header, guest: Guest) -> None:
    """Raise ``InputError`` unless this is the guest that the trace was made with."""
    found = dict(zip(("image", "manifest"), digests(guest), strict=True))
    for name, wanted in (("image", header.image), ("manifest", header.manifest)):
        if found[name] != wanted:
            has, wants = (f"SHA-256 {digest}" if digest else "none" for digest in (found[name], wanted))
            what = f"recorded with the {name} {wants}, and that of {guest.name} is {has}"
            raise InputError(what, where=str(trace.path), fix=f"give --guest with that {name}")


def machine_for(header: Header, guest: Guest, *, seconds: float | None = None) -> Machine:
    """A machine like the one that the trace was made with; raises ``InputError`` for what no machine has."""
    manifest = guest.manifest
    if dict(header.policy) != attrs.asdict(manifest.policy):
        manifest = evolve(manifest, policy=policy_from(dict(header.policy), manifest, "the trace's header"))
    # What devices say comes from the trace; the files that they would say it from may be gone.
    options = RunOptions(
        input=None if manifest.input is None else b"",
        time=None if manifest.clock is None else 0,
        single_step=header.single_step,
        traps=header.traps,
        block_events=header.blocks,
        callers=header.callers,
        capacity=header.capacity,
        seed=header.seed,
        seconds=seconds,
        ept=ept_from(dict(header.ept), "the trace's header"),
    )
    machine = Machine(evolve(guest, manifest=manifest), options)
    for port in header.exact_ports:
        machine.ports.attach(_ExactPort(), port)
    return machine


class _ExactPort:
    """Stands in for a device of a host program that stopped the guest before each access."""

    exact = True

    def read(self, _port: int, size: int) -> int:
        """Nobody is there: what the device said is in the trace."""
        return (1 << 8 * size) - 1

    def write(self, _port: int, _size: int, _value: int) -> None:
        """What the device did is in the trace."""


class Replay:
    """A machine that is given the inputs of a trace, and whose own trace is compared with it.

    ``keep``, if given, gets the new trace. Soon after the first difference, and where the recording was cut off, the
    run is stopped. Within ``with``: ``begin``, run the machine, ``finish``.
    """

    def __init__(self, trace: WholeTrace, header: Header, machine: Machine, keep: Output | None = None) -> None:
        self._comparison = Comparison()
        self._cut = trace.cut
        self._over = trace.cut == 0
        self._machine = machine
        self._keep = keep
        self._reader = TraceReader(trace.path)
        self._player = Player(trace.path, machine)
        self._recorded = self._lines()
        self._at = 0
        self._sink = record(machine, self, target=header.target, batch=1)
        self._player.attach(acts=header.interactive)
        machine.observe(self._look)

    def begin(self) -> None:
        """Do what was done before the run."""
        self._player.perform()
        if self._over:
            self._stop()

    def finish(self) -> Difference | None:
        """Say how the new trace compares, now that the run is over: the first difference, None if there is none."""
        self._sink.flush()
        rest = next(self._recorded, None)
        if rest is not None and self._cut is None:
            self._comparison.take(rest, None)
        return self._comparison.difference()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._reader.close()
        self._player.close()

    def write(self, data: bytes, /) -> None:
        """Take lines of the new trace (``vmm.trace.sink.Output``)."""
        if self._keep is not None:
            self._keep.write(data)
        for text in data.splitlines(keepends=True):
            self._at += 1
            if not self._over and not self._comparison.complete:
                self._compare(TraceLine(self._at, text, json.loads(text)))

    def _lines(self) -> Iterator[TraceLine]:
        yield TraceLine(1, self._reader.header_text, self._reader.header)
        yield from self._reader.lines()

    def _compare(self, line: TraceLine) -> None:
        self._comparison.take(next(self._recorded, None), line)
        self._over = self._cut is not None and line.seq == self._cut and line.object.get("kind") not in BETWEEN

    def _look(self, _record: Record) -> None:
        if (self._over or self._comparison.complete) and not self._machine.reporter.stopped:
            self._stop()

    def _stop(self) -> None:
        """End the run, even where nobody may act on the guest and its exits are answered in the middle of a block."""
        self._machine.stop()
        self._machine.state.stop_engines()


@frozen(slots=True)
class _Due:
    """An input of the trace with its place."""

    at: int
    seq: int
    depth: int
    given: Input


class Player:
    """Gives a machine the inputs of a trace: each at the record that it came after, in order.

    What the machine does not ask for, or asks for at another place, is left; the comparison of the traces shows it.
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
        self._machine.inputs.source = self._answer
        self._machine.observe(self._see, acts=acts)
        if acts:
            for kind in Exit.__subclasses__():
                self._machine.on(kind)(self._decide)

    def close(self) -> None:
        """Close the trace."""
        self._reader.close()

    def perform(self) -> None:
        """Do what was done at this place."""
        while (due := self._due()) is not None and not isinstance(due.given, PortRead | Decision):
            self._advance()
            self._depth += 1
            try:
                due.given.apply(self._machine)
            except OptionError as problem:
                raise self._impossible(due, problem.what) from None
            finally:
                self._depth -= 1

    def _see(self, _record: Record) -> None:
        self._count += 1
        self.perform()

    def _decide(self, record: Exit) -> Event | bool | None:
        due = self._due()
        if due is None or not isinstance(due.given, Decision):
            return None
        self._advance()
        if due.given.event is None:
            return True
        if not isinstance(record, REPLACEABLE):
            raise self._impossible(due, f"an event in place of {record.reason.name}")
        return due.given.event

    def _answer(self, port: int, size: int) -> int | None:
        due = self._due()
        if due is None or not isinstance(due.given, PortRead) or (due.given.port, due.given.size) != (port, size):
            return None
        self._advance()
        return due.given.value

    def _due(self) -> _Due | None:
        due = self._next
        return due if due is not None and (due.seq, due.depth) == (self._count, self._depth) else None

    def _advance(self) -> None:
        self._next = next(self._inputs, None)

    def _read(self) -> Iterator[_Due]:
        for line in self._reader.lines():
            if line.kind == "input":
                depth = line.object.get("depth", 0)
                yield _Due(line.at, line.seq, depth if type(depth) is int else -1, parse(line.object))

    def _impossible(self, due: _Due, what: str) -> InputError:
        where = f"{self._reader.name}:{due.at}"
        return InputError(f"an input that no run could have: {what}", where=where, fix=_RECORD_AGAIN)
