"""Guests in files, recorded and replayed through the same calls that the commands make."""

from __future__ import annotations

import io
from pathlib import Path

import tiny
from click.testing import CliRunner

from vmm.cli import main
from vmm.guest.loader import load_guest
from vmm.machine import Machine, RunOptions
from vmm.recording import record
from vmm.replay import Replay, check_guest, guest_of, header_of, machine_for
from vmm.trace.whole import WholeTrace

INPUT, LEFT, CLOCK = 0xE0, 0xE1, 0xE4
MANIFEST = """
schema = "vmm-guest/1"
name = "{name}"
[image]
format = "flat"
file = "image.bin"
load = 0x10000
[machine]
memory = 0x100000
mode = "long"
[cpu]
entry = 0x10000
registers = {{ rsp = 0x80000 }}
{idt}
[policy]
code = "load"
[input]
port = {input:#x}
[clock]
port = {clock:#x}
"""
#: Adds up the bytes of its input, and ends with the sum.
READER = f"""
again:
    in al, {LEFT}
    test al, al
    jz over
    in al, {INPUT}
    add bl, al
    jmp again
over:
    mov al, bl
    out 0xf4, al
"""
#: The last page of an image in files, for an IDT.
IDT = 0x13000


def guest(folder: Path, source: str, *, gates: dict[int, int] | None = None, name: str = "tiny") -> Path:
    """A folder with a guest of assembly text; ``gates`` are its interrupt gates, {vector: address}."""
    folder.mkdir(exist_ok=True)
    idt = bytearray(0x1000)
    for vector, address in (gates or {}).items():
        low, high = (address & 0xFFFF).to_bytes(2, "little"), (address >> 16).to_bytes(6, "little")
        idt[16 * vector : 16 * vector + 16] = low + b"\x08\0\0\x8e" + high + bytes(4)
    image = tiny.assemble(source).ljust(IDT - tiny.CODE, b"\xcc") + bytes(idt)
    (folder / "image.bin").write_bytes(image)
    key = f"idt = {IDT:#x}" if gates else ""
    (folder / "guest.toml").write_text(MANIFEST.format(name=name, input=INPUT, clock=CLOCK, idt=key))
    return folder


def recorded(path: Path, target: Path | str, options: RunOptions | None = None, prepare=lambda machine: None) -> bytes:
    """Record a run into a file; ``prepare`` acts on the machine first, as a host program does."""
    output = io.BytesIO()
    with Machine(load_guest(target), options) as machine:
        sink = record(machine, output, target=str(target))
        prepare(machine)
        machine.run()
        sink.flush()
    path.write_bytes(output.getvalue())
    return output.getvalue()


def replayed(path: Path):
    """Replay a trace: the new one, and the first difference."""
    trace = WholeTrace.read(path)
    header = header_of(trace)
    found = guest_of(header)
    check_guest(trace, header, found)
    output = io.BytesIO()
    with machine_for(header, found) as machine, Replay(trace, header, machine, output) as replay:
        replay.begin()
        machine.run()
        difference = replay.finish()
    return output.getvalue(), difference


def vmm(*arguments, given: bytes | None = None):
    """The command line."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=given)


def lines(trace: bytes) -> list[bytes]:
    return trace.splitlines(keepends=True)
