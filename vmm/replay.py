"""Having a recorded run again: the same guest, given the inputs of its trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import attrs
from attrs import evolve

from vmm.errors import InputError, OptionError
from vmm.guest import linux, multiboot
from vmm.guest.ept import ept_from
from vmm.guest.files import one_line, shown
from vmm.guest.loader import load_guest
from vmm.guest.manifest_reader import policy_from
from vmm.machine import Machine, RunOptions
from vmm.player import RECORD_AGAIN, Player
from vmm.recording import digests, record
from vmm.records import Record
from vmm.trace.comparison import Comparison
from vmm.trace.header import Header, RecordedBoot
from vmm.trace.reading import BETWEEN, TraceLine, TraceReader

if TYPE_CHECKING:
    from vmm.guest.loader import Guest
    from vmm.trace.comparison import Difference
    from vmm.trace.sink import Output
    from vmm.trace.whole import WholeTrace

_HEADER: Final = "the trace's header"


def header_of(trace: WholeTrace) -> Header:
    """The header of a trace that is to be replayed; raises ``InputError`` for one that says too little."""
    try:
        return Header.parse(trace.header)
    except ValueError as problem:
        raise InputError(f"the header has {problem}", where=f"{trace.path}:1", fix=RECORD_AGAIN) from None


def guest_of(header: Header, target: str | None = None, modules: Sequence[str] = ()) -> Guest:
    """The guest that a trace was made with; raises ``InputError``.

    ``target`` and ``modules`` say where its image, and the files that were loaded besides it, are now; None and no
    modules: where they were.
    """
    target = header.target if target is None else target
    if header.boot is None:
        if modules:
            fix = "leave it out"
            raise OptionError(f"{one_line(header.guest)} was loaded without modules", where="--module", fix=fix)
        return load_guest(target)
    files = tuple(map(Path, modules or header.boot.files))
    if len(files) != len(header.boot.modules):
        fix = f"give each of the {len(header.boot.modules)} that were loaded, in order"
        raise OptionError(f"{len(files)} modules", where="--module", fix=fix)
    try:
        return _load(Path(target), files, header, header.boot)
    except OptionError as problem:
        raise InputError(problem.what, where=_HEADER, fix=RECORD_AGAIN) from None


def _load(image: Path, modules: tuple[Path, ...], header: Header, boot: RecordedBoot) -> Guest:
    text, memory, seconds = boot.command_line, header.memory, float("inf")
    if boot.protocol == linux.PROTOCOL and len(modules) <= 1:
        initrd = modules[0] if modules else None
        return linux.load_linux(
            image, initrd=initrd, command_line=text, memory=memory, seconds=seconds, apic=boot.apic
        )
    if boot.protocol == multiboot.PROTOCOL and boot.names:
        return multiboot.load_multiboot(
            image,
            modules=modules,
            command_line=text,
            memory=memory,
            seconds=seconds,
            names=boot.names,
            apic=boot.apic,
        )
    what = f"loaded by {shown(boot.protocol)} with {len(modules)} modules, which this VMM does not know"
    raise InputError(what, where=_HEADER, fix=RECORD_AGAIN)


def check_guest(trace: WholeTrace, header: Header, guest: Guest) -> None:
    """Raise ``InputError`` unless this is the guest that the trace was made with."""
    found = digests(guest)
    pairs = [("image", "--guest", found.image, header.image), ("manifest", "--guest", found.manifest, header.manifest)]
    if guest.protocol is not None and header.boot is not None:
        files = zip(guest.protocol.modules, found.modules, header.boot.modules, strict=True)
        pairs += [(f"file {one_line(path.name)}", "--module", has, wants) for path, has, wants in files]
    for name, option, has, wants in pairs:
        if has != wants:
            have, want = (f"SHA-256 {digest}" if digest else "none" for digest in (has, wants))
            what = f"recorded with the {name} {want}, and that of {guest.name} is {have}"
            raise InputError(what, where=str(trace.path), fix=f"give {option} with that {name}")


def machine_for(header: Header, guest: Guest, *, seconds: float | None = None) -> Machine:
    """A machine like the one that the trace was made with; raises ``InputError`` for what no machine has."""
    manifest = guest.manifest
    if header.manifest is None:
        manifest = evolve(manifest, name=header.guest)  # it is called after its file, which may have been renamed
    if dict(header.policy) != attrs.asdict(manifest.policy):
        manifest = evolve(manifest, policy=policy_from(dict(header.policy), manifest, _HEADER))
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
        ept=ept_from(dict(header.ept), _HEADER),
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
        files = None if header.boot is None else header.boot.files
        self._sink = record(machine, self, target=header.target, modules=files, batch=1)
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
