"""Boots of Debian's kernel as the tests of this folder make them, with a second copy of all code beside each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from attrs import define, field
from shadow import Shadow

from vmm.commands.typist import Typist
from vmm.guest.linux import load_linux
from vmm.machine import Machine, RunOptions
from vmm.records import End, Json, Record
from vmm.trace.sink import line

COMMANDS = (
    b"uname -sr",
    b"cat /proc/cpuinfo | grep -c processor",
    b"seq 1 1000 | md5sum",
    b"dd if=/dev/zero bs=64k count=16 2>/dev/null | md5sum",
    b"grep ' start_kernel$' /proc/kallsyms",
    b"sleep 1; echo slept",
    b"poweroff -f",
)
APPEND = "console=ttyS0 quiet panic=-1"
PROMPT = b"# "


@define
class Boot:
    """One boot: what it printed, how it ended, and digests of all that could differ."""

    machine: Machine
    shadow: Shadow
    trace: object = field(factory=hashlib.sha256)
    records: int = 0
    end: End | None = None
    #: Its records as a trace has them, where somebody wants them (``keep``).
    objects: list[Json] = field(factory=list)

    def keep(self) -> None:
        self.machine.observe(lambda record: self.objects.append(record.to_json()))

    def record(self, record: Record) -> None:
        self.records += 1
        self.trace.update(line(self.records, record).encode())

    @property
    def console(self) -> str:
        return self.machine.console.output.decode()

    def digest(self) -> tuple[str, str, str, int]:
        memory = hashlib.sha256(self.machine.memory.bytes).hexdigest()
        return self.trace.hexdigest(), memory, self.console, self.machine.pc.now()


def boot(
    kernel: Path,
    initrd: Path,
    options: RunOptions | None = None,
    *,
    commands: Iterable[bytes] = COMMANDS,
    prepare: Callable[[Boot], None] = lambda made: None,
) -> Boot:
    """Boot, type ``commands`` at the shell's prompts, and go on to the end; ``prepare`` gets the boot before that."""
    machine = Machine(load_linux(kernel, initrd=initrd, command_line=APPEND, seconds=7200.0), options)
    made = Boot(machine, Shadow(machine))
    machine.observe(made.record)
    prepare(made)
    Typist(commands, PROMPT).connect(machine)
    made.end = machine.run()
    return made
