"""What it costs to look for return addresses at a store to code: ``python benchmarks/callers.py``.

The best of several rounds, in microseconds: with the stack of the store before, and with another one. The stack is like
a kernel's: two return addresses, pointers to data, small numbers.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import tiny

from vmm.trap.callers import DEPTH, Callers

ROUNDS, TIMES = 7, 5000
CODE = f"call first; {tiny.END} first: call second; ret; second: ret"
RETURNS = (tiny.CODE + 5, tiny.CODE + 12)
DIRECT_MAP = 0xFFFF_8880_0000_0000


def microseconds(action: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.process_time()
        for _ in range(TIMES):
            action()
        best = min(best, time.process_time() - begin)
    return best / TIMES * 1e6


def main() -> None:
    made = tiny.build(CODE)
    made.run()
    machine, vcpu = made.machine, made.machine.vcpu
    callers = Callers(machine.memory, machine.frames, vcpu.mmu, vcpu.context)
    vcpu.context.rsp = stack = tiny.STACK - 8 * DEPTH
    pointers = [DIRECT_MAP + 64 * number for number in range(DEPTH - 4)]
    machine.memory.write(stack, struct.pack(f"<{DEPTH}Q", RETURNS[1], *pointers, RETURNS[0], 0, 1))
    assert callers.find(tiny.CODE) == RETURNS[::-1]
    numbers = iter(range(1 << 40, 1 << 41))

    def another() -> None:
        machine.memory.write(stack + 8, struct.pack("<Q", next(numbers)))
        callers.find(tiny.CODE)

    print(f"the same stack   {microseconds(lambda: callers.find(tiny.CODE)):5.1f}")
    print(f"another stack    {microseconds(another):5.1f}")


if __name__ == "__main__":
    main()
