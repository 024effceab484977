"""The defendant: a program's outcome under the VMM, in every way to run it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from attrs import field, frozen

from vmm.exits import ExceptionExit
from vmm.machine import Machine, RunOptions
from vmm.records import Record

from .program import BASE, Fault, Outcome, Program


@frozen(slots=True)
class Way:
    """One way to run a program. ``watched`` has every record made, as with a trace."""

    name: str
    options: RunOptions = field(factory=RunOptions)
    policy: dict[str, str] = field(factory=dict)
    watched: bool = True


WAYS: Final = (
    Way("plain", watched=False),
    Way("checked", RunOptions(check=True, audit=True, block_events=True)),
    Way("stepped", RunOptions(single_step=True)),
    Way("four blocks", RunOptions(capacity=4, check=True)),
    Way("window", RunOptions(check=True), {"writes": "window"}),
    Way("adaptive", RunOptions(check=True), {"writes": "adaptive", "reads": "grant"}),
    Way("code at load", RunOptions(), {"code": "load"}),
)


class Died(Exception):
    """The run ended neither at the port nor in a triple fault."""


def run_in_vmm(program: Program, way: Way = WAYS[0]) -> Outcome:
    """Run the program; raises ``Died``. Without ``watched`` exceptions are not listed."""
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine.from_manifest(program.write_manifest(Path(folder), way.policy), way.options)
        faults: list[Fault] = []

        def watch(record: Record) -> None:
            if isinstance(record, ExceptionExit):
                faults.append(Fault(record.vector, record.error_code, record.address, record.rip))

        if way.watched:
            machine.observe(watch)
        end = machine.run()
        machine.verify()
    if end.reason not in ("port", "triple fault"):
        raise Died(f"{end.reason} at {end.rip:#x}")
    registers = machine.vcpu.context.registers()
    value = end.detail["value"] if end.reason == "port" else None
    return Outcome(value, registers, machine.read(BASE, program.memory - BASE), tuple(faults))
