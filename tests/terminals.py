"""``vmm boot`` on a terminal of its own, and somebody who types there."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[1]


class Session:
    """A boot at a terminal, which ends with the ``with`` block; ``patience`` is how many seconds an answer may take."""

    def __init__(self, *arguments: str, patience: float = 60.0) -> None:
        self.master, self._slave = pty.openpty()
        self.before = termios.tcgetattr(self._slave)
        self.output = b""
        self._patience = patience
        command = [sys.executable, "-m", "vmm", "boot", *arguments]
        terminal = {"stdin": self._slave, "stdout": self._slave, "stderr": self._slave}
        self.process = subprocess.Popen(command, **terminal, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def expect(self, text: bytes) -> None:
        end = time.monotonic() + self._patience
        while text not in self.output:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} is not in {self.output!r}"
            self.output += os.read(self.master, 4096)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    @property
    def modes(self) -> list:
        """The terminal's modes now."""
        return termios.tcgetattr(self._slave)

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        return self.process.wait(self._patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self.master)
