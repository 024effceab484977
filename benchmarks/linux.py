"""How long Debian's kernel takes to its shell, trapped and under QEMU: ``python benchmarks/linux.py FOLDER``.

``python tests/linux/debian.py FOLDER`` makes the folder. Figures are seconds of processor time, the best of several
rounds by turns, since hosts are shared. QEMU (``qemu-system-x86_64``, its TCG) is left out where it is not installed.
``--profile`` says where the VMM's time goes, by another boot that is measured from inside.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from vmm.cpu.engine import Engine
from vmm.cpu.free import FreeRunningEngine
from vmm.cpu.stepping import SteppingEngine
from vmm.guest.linux import load_linux
from vmm.machine import Machine
from vmm.processor import Processor

P = ParamSpec("P")
T = TypeVar("T")
APPEND = "console=ttyS0 quiet panic=-1"
PROMPT = b"/ # "


def under_the_trap(folder: Path) -> float:
    begin = time.process_time()
    guest = load_linux(folder / "vmlinuz", initrd=folder / "initrd.cpio", command_line=APPEND)
    with Machine(guest) as machine:
        seen = bytearray()

        def hear(data: bytes) -> None:
            seen.extend(data)
            if seen.endswith(PROMPT):
                machine.stop()

        machine.on_output(hear)
        machine.run()
    return time.process_time() - begin


def under_qemu(folder: Path) -> float:
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nographic", "-no-reboot"]
    command += ["-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd.cpio"), "-append", APPEND]
    before = os.times()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as process:
        seen = b""
        while PROMPT not in seen:
            seen += os.read(process.stdout.fileno(), 4096)  # type: ignore[union-attr] # it is a pipe
        process.kill()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


class Profile:
    """Time by part of the VMM; what a part calls of another is the other's."""

    PARTS = (
        ("the engine itself", FreeRunningEngine, "run"),
        ("fills that Python answers", Engine, "_on_fill"),
        ("new translations", FreeRunningEngine, "_on_edge"),
        ("VM exits but for their steps", Processor, "_answer"),
        ("steps", SteppingEngine, "step"),
        ("ports", Engine, "_on_in"),
        ("ports", Engine, "_on_out"),
        ("time-stamp counter", Engine, "_time"),
        ("the run loop", Processor, "take_turn"),
    )

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner = [0.0]
        for part, owner, name in self.PARTS:
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[P, T]) -> Callable[P, T]:
        clock, inner = time.perf_counter, self._inner

        @functools.wraps(function)
        def timed(*arguments: P.args, **more: P.kwargs) -> T:
            begin = clock()
            inner.append(0.0)
            try:
                return function(*arguments, **more)
            finally:
                whole = clock() - begin
                self.seconds[part] += whole - inner.pop()
                self.calls[part] += 1
                inner[-1] += whole

        return timed

    def print(self) -> None:
        """Print the parts, the largest first."""
        whole = sum(self.seconds.values())
        for part, seconds in self.seconds.most_common():
            print(f"  {part:30} {100 * seconds / whole:3.0f} %  {self.calls[part]:8} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where tests/linux/debian.py has put vmlinuz and initrd.cpio")
    parser.add_argument("--rounds", type=int, default=3, help="boots of each (default: 3)")
    parser.add_argument("--profile", action="store_true", help="say where the VMM's time goes")
    options = parser.parse_args()
    has_qemu = shutil.which("qemu-system-x86_64") is not None
    rounds = [
        (under_the_trap(options.folder), under_qemu(options.folder) if has_qemu else None)
        for _ in range(options.rounds)
    ]
    ours = min(ours for ours, _ in rounds)
    print(f"vmm   {ours:6.2f} s")
    if has_qemu:
        theirs = min(theirs for _, theirs in rounds if theirs is not None)
        print(f"qemu  {theirs:6.2f} s   vmm takes {ours / theirs:.1f} times as long")
    if options.profile:
        profile = Profile()
        under_the_trap(options.folder)
        profile.print()


if __name__ == "__main__":
    main()
