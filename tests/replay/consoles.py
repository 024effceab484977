"""Tiny kernels with a console, and somebody at it whose time is made up."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path

import pc_guests
from attrs import define, field
from pc_guests import IDT, MASTER, prologue, timer

from vmm.guest.linux import load_linux
from vmm.machine import Machine, RunOptions
from vmm.recording import record

MEMORY = 18 << 20
#: Prints a prompt, gives back each line in upper case, forever, and never sleeps.
BUSY = """
    mov dx, 0x3f8; mov al, 0x3e; out dx, al
    read: mov dx, 0x3fd; in al, dx; test al, 1; jz read
    mov dx, 0x3f8; in al, dx; cmp al, 10; je newline
    and al, 0xdf; out dx, al; jmp read
    newline: out dx, al; mov al, 0x3e; out dx, al; jmp read
"""
#: Prints a prompt, gives each character back, and counts timer interrupts in EBX; ``wait`` is what it does meanwhile.
INTERRUPTED = """
    {prologue} lea rax, [rip + tick]
    mov edi, {gate}; mov [rdi], ax; mov word ptr [rdi + 2], 0x10; mov word ptr [rdi + 4], 0x8e00
    shr rax, 16; mov [rdi + 6], ax; shr rax, 16; mov [rdi + 8], eax; mov dword ptr [rdi + 12], 0
    mov al, 0xee; out 0x21, al; {timer}
    mov dx, 0x3f9; mov al, 1; out dx, al; mov dx, 0x3fc; mov al, 8; out dx, al
    mov dx, 0x3f8; mov al, 0x3e; out dx, al
    sti
    again: {wait}; jmp again
    handler: push rax; push rdx; mov dx, 0x3f8; in al, dx; out dx, al; mov al, 0x20; out 0x20, al; pop rdx; pop rax
    iretq
    tick: push rax; inc ebx; mov al, 0x20; out 0x20, al; pop rax; iretq
"""
#: Without the timer, a processor that is halted has nothing to wait for but what is typed.
KERNELS = {
    "busy": BUSY,
    "asleep": INTERRUPTED.format(prologue=prologue(MASTER + 4), gate=IDT + 16 * MASTER, timer=timer(5000), wait="hlt"),
    "no timer": INTERRUPTED.format(prologue=prologue(MASTER + 4), gate=IDT + 16 * MASTER, timer="", wait="hlt"),
    "spinning": INTERRUPTED.format(
        prologue=prologue(MASTER + 4), gate=IDT + 16 * MASTER, timer=timer(1200), wait="inc ecx"
    ),
    "clock": INTERRUPTED.format(
        prologue=prologue(MASTER + 4), gate=IDT + 16 * MASTER, timer=timer(1200), wait="rdtsc; mov esi, eax"
    ),
}


def kernels(folder: Path) -> dict[str, Path]:
    """The files of all tiny kernels."""
    found = {}
    for name, source in KERNELS.items():
        home = folder / name
        home.mkdir()
        found[name] = pc_guests.kernel(home, source)
    return found


@define
class Visitor:
    """Implements ``vmm.pc.Outside``: types each piece after so many looks at it, and leaves with the last.

    ``naps`` is how long, by the host's clock, each of a halted processor's waits takes.
    """

    machine: Machine
    pieces: deque[tuple[int, bytes]]
    naps: Iterator[int]
    looks: int = field(default=0, init=False)

    @classmethod
    def sit_down(cls, machine: Machine, pieces: Iterable[tuple[int, bytes]], naps: Iterable[int]) -> None:
        machine.pc.outside = cls(machine, deque(pieces), cycle(naps))

    @property
    def waiting(self) -> bool:
        self.looks += 1
        return not self.pieces or self.looks > self.pieces[0][0]

    def poll(self) -> bytes:
        if not self.waiting:
            return b""
        self.looks = 0
        if self.pieces:
            return self.pieces.popleft()[1]
        self.machine.stop()
        return b""

    def sleep(self, nanoseconds: int | None) -> int:
        self.looks += 1
        nap = next(self.naps)
        return nap if nanoseconds is None else min(nap, nanoseconds)


def boot(path: Path, kernel: Path, prepare, options: RunOptions | None = None, **rest) -> bytes:
    """Record a boot into a file; ``prepare`` gets the machine before it runs."""
    output = io.BytesIO()
    rest.setdefault("memory", MEMORY)
    with Machine(load_linux(kernel, **rest), options) as machine:
        sink = record(machine, output)
        prepare(machine)
        machine.run()
        sink.flush()
    path.write_bytes(output.getvalue())
    return output.getvalue()
