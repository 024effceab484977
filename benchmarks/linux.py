"""How long Debian's kernel takes to its shell, trapped and under QEMU: ``python benchmarks/linux.py FOLDER``.

``python tests/linux/debian.py FOLDER`` makes the folder. Figures are seconds of processor time, since hosts are shared.
QEMU (``qemu-system-x86_64``, its TCG) is left out where it is not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from vmm.guest.linux import load_linux
from vmm.machine import Machine

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


def main() -> None:
    folder = Path(sys.argv[1])
    ours = under_the_trap(folder)
    print(f"vmm   {ours:6.2f} s")
    if shutil.which("qemu-system-x86_64"):
        theirs = under_qemu(folder)
        print(f"qemu  {theirs:6.2f} s   vmm takes {ours / theirs:.1f} times as long")


if __name__ == "__main__":
    main()
