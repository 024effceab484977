"""What the trap costs, as ratios taken in one run: ``python benchmarks/speed.py``.

Free running is compared with bare Unicorn (its own TLB, no hooks) on the same machine code; a trap cycle with the
bare ``emu_start`` of one instruction and back. Every figure is the best of several rounds, since the host is shared.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from keystone import KS_ARCH_X86, KS_MODE_64, Ks
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn.x86_const import UC_X86_REG_RSP

from vmm.machine import Machine, RunOptions
from vmm.recording import record

CODE, DATA, STACK, MEMORY = 0x10000, 0x80000, 0xF0000, 0x100000
ROUNDS = 10

LOOPS = {
    # name: (body of the loop, instructions in it, iterations, least ratio wanted)
    "compute": (
        "add rax, rcx; imul rax, rbx; xor rdx, rax; lea rbx, [rax + rdx*2 + 7]; ror rdx, 3",
        7,
        40_000_000,
        0.95,
    ),
    "mixed": (
        "mov rax, [rdi]; add rax, rcx; mov [rdi + 8], rax; call function; mov [rdi + 16], rdx",
        9,
        3_000_000,
        3.0,
    ),
    "store": (
        "mov [rdi], rax; mov [rdi + 8], rcx; mov [rdi + 64], rax; mov [rdi + 128], rcx",
        6,
        2_000_000,
        5.0,
    ),
}


def assemble(text: str) -> bytes:
    code, _ = Ks(KS_ARCH_X86, KS_MODE_64).asm(text, CODE)
    return bytes(code)


def loop_code(body: str, iterations: int, end: str) -> bytes:
    return assemble(
        f"mov rcx, {iterations}; mov rdi, {DATA}; again: {body}; dec rcx; jnz again; {end}; function: mov rdx, rax; ret"
    )


def machine(folder: Path, code: bytes, *, extra: str = "", registers: str = "") -> Machine:
    (folder / "image.bin").write_bytes(code)
    (folder / "guest.toml").write_text(
        f"""
schema = "vmm-guest/1"
name = "benchmark"
[image]
format = "flat"
file = "image.bin"
load = {CODE}
[machine]
memory = {MEMORY}
mode = "long"
[cpu]
entry = {CODE}
cpl = 3
iopl = 3
registers = {{ rsp = {STACK}{registers} }}
[paging]
identity = "rwx"
{extra}
[limits]
exits = 100000000
"""
    )
    return Machine.from_manifest(folder / "guest.toml", RunOptions())


def bare_unicorn(code: bytes) -> float:
    engine = Uc(UC_ARCH_X86, UC_MODE_64)
    engine.mem_map(0, MEMORY)
    engine.mem_write(CODE, code)
    engine.reg_write(UC_X86_REG_RSP, STACK)
    begin = time.process_time()
    engine.emu_start(CODE, 0)
    return time.process_time() - begin


def ours(folder: Path, code: bytes) -> float:
    guest = machine(folder, code)
    begin = time.process_time()
    end = guest.run()
    took = time.process_time() - begin
    assert end.reason == "port", end
    return took


def free_running(folder: Path) -> dict[str, object]:
    """Ratio of our speed to bare Unicorn's for each loop."""
    out: dict[str, object] = {}
    for name, (body, size, iterations, wanted) in LOOPS.items():
        bare = mine = float("inf")
        for _ in range(ROUNDS):  # in turns, so that both see the same moods of the host
            bare = min(bare, bare_unicorn(loop_code(body, iterations, "hlt")))
            mine = min(mine, ours(folder, loop_code(body, iterations, "out 0xf4, al")))
        mips = size * iterations / mine / 1e6
        bare_mips = size * iterations / bare / 1e6
        ratio = round(bare / mine, 2)
        out[name] = {"ratio": ratio, "wanted": wanted, "MIPS": round(mips), "bare MIPS": round(bare_mips)}
    return out


def trap_cycle(folder: Path, *, traced: bool, count: int = 20_000) -> float:
    """Seconds for one trapped store through an alias, with the call of the patched function."""
    alias = '[[paging.map]]\ngva = 0x8000000\ngpa = 0x20000\nlength = 0x1000\naccess = "rw"'
    code = assemble(
        f"mov ecx, {count}; xor edi, edi; mov rbx, 0x8000001; again: mov [rbx], ecx; mov rdx, 0x20000; call rdx; "
        "add rdi, rax; dec ecx; jnz again; out 0xf4, al"
    )
    image = code.ljust(0x10000, b"\x90") + b"\xb8\x00\x00\x00\x00\xc3"
    guest = machine(folder, image, extra=alias)
    if traced:
        record(guest, io.BytesIO())
    begin = time.process_time()
    guest.run()
    took = time.process_time() - begin
    assert guest.register("rdi") == count * (count + 1) // 2, "a patch was missed"
    assert guest.door.modifications == count - 1  # before the first call the function is data
    return took / count


def bare_step() -> float:
    """Seconds for ``emu_start`` of one instruction and back, on bare Unicorn."""
    engine = Uc(UC_ARCH_X86, UC_MODE_64)
    engine.mem_map(0, MEMORY)
    engine.mem_write(CODE, assemble("inc rcx; nop; nop; hlt"))
    begin = time.process_time()
    for _ in range(5_000):
        engine.emu_start(CODE, CODE + 3)
    return (time.process_time() - begin) / 5_000


def start_up() -> float:
    """Seconds for ``vmm run`` of a small bundled guest, from process start to exit, by the clock on the wall."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vmm", "run", "patch-ahead", "--quiet"], check=True, capture_output=True)
    return time.perf_counter() - begin


def best(measure: Callable[[], float]) -> float:
    return min(measure() for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = best(bare_step)
        untraced = best(lambda: trap_cycle(folder, traced=False))
        traced = best(lambda: trap_cycle(folder, traced=True))
        result = {
            "free running, times bare Unicorn": free_running(folder),
            "bare step, us": round(step * 1e6, 2),
            "trap cycle, us": round(untraced * 1e6, 2),
            "trap cycle with record, us": round(traced * 1e6, 2),
            "trap cycle with record, bare steps (wanted: at most 6)": round(traced / step, 2),
            "start-up, s (wanted: below 0.5)": round(best(start_up), 2),
        }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for what, value in result.items():
        if isinstance(value, dict):
            print(what)
            for loop, figures in value.items():
                print(f"  {loop:10} " + "  ".join(f"{key} {figure}" for key, figure in figures.items()))
        else:
            print(f"{what:60} {value}")


if __name__ == "__main__":
    main()
