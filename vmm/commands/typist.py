"""Somebody at a serial console who types a line of a file whenever there is a prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vmm.machine import Machine


class Typist:
    """Types ``lines`` one by one, each when the console shows ``prompt``; at one more prompt the run ends.

    When a line is typed depends on nothing but what the guest has printed, so that runs repeat.
    """

    def __init__(self, lines: Iterable[bytes], prompt: bytes) -> None:
        self._lines: Final = deque(lines)
        self._prompt: Final = prompt
        self._seen = b""
        self._machine: Machine

    def connect(self, machine: Machine) -> None:
        """Sit down at the first serial port of a PC."""
        self._machine = machine
        machine.on_output(self._read)

    def _read(self, data: bytes) -> None:
        self._seen = (self._seen + data)[-len(self._prompt) :]
        if self._seen != self._prompt:
            return
        self._seen = b""
        if self._lines:
            self._machine.type_in(self._lines.popleft() + b"\n")
        else:
            self._machine.stop()
