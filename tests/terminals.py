"""``vmm boot`` as somebody at a terminal has it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time


class Session:
    """``vmm boot`` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "vmm", "boot", *arguments]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
        os.close(slave)
        self.output = b""

    def expect(self, text: bytes) -> None:
        end = time.monotonic() + 60
        while text not in self.output:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} is not in {self.output!r}"
            self.output += os.read(self.master, 4096)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self.master)
